"""An answer as a row to train on: `prompt` and `completion`, as `fastpost sft` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastpost.data import Prompt
from fastpost.data.chat import rendered
from fastpost.stages.groups import Answer, Group


def demonstration(group: Group, answer: Answer, tools: Sequence[Any] | None = None) -> dict[str, Any]:
    """The row of an answer, with its reward, and with the schemas of the tools that its prompt showed."""
    prompt = Prompt(group.prompt, [], dict(group.columns))
    row = {"prompt": prompt.prompt, "completion": answer.to(prompt), "reward": answer.reward}
    row |= rendered(group.columns)
    return row | ({"tools": list(tools)} if tools else {})
