"""An answer as a row to train on: `prompt` and `completion`, as `fastpost sft` reads them."""

from __future__ import annotations

from typing import Any

from fastpost.data import Prompt
from fastpost.stages.groups import Answer, Group

RENDERED = ("tools", "chat_template_kwargs")  # columns without which a conversation would be other tokens


def demonstration(group: Group, answer: Answer) -> dict[str, Any]:
    """The row of an answer, with its reward."""
    prompt = Prompt(group.prompt, [], dict(group.columns))
    row = {"prompt": prompt.prompt, "completion": prompt.answered(answer.text), "reward": answer.reward}
    return row | {name: group.columns[name] for name in RENDERED if name in group.columns}
