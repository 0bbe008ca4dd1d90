"""The parts of a conversation, put together and checked before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastpost.models.heads import unwrapped
from fastpost.models.trunk import causal_lm
from fastpost.rollout import Sampling
from fastpost.rollout.request import end_tokens
from fastpost.turns.bench import Bench, Limits
from fastpost.turns.calls import parser_of
from fastpost.turns.converse import Turns
from fastpost.turns.frame import Frame
from fastpost.turns.tools import Tool
from fastpost.turns.user import load_user


def load_turns(
    tools: Sequence[Tool],
    model: Any,
    tokenizer: Any,
    limits: Limits,
    sampling: Sampling,
    say: Callable[[str], None],
    *,
    max_tool_calling_iterations: int | None = None,
    user: str | None = None,  # file.py:function, or the directory of a model
    max_user_turns: int = 4,
) -> Turns:
    """What is between the turns of this model."""
    lm, schemas = causal_lm(unwrapped(model)), [tool.schema for tool in tools]
    name, parser = parser_of(tokenizer, schemas)
    frame = Frame(tokenizer, end_tokens(lm, tokenizer), schemas)
    marks = "<tool_call>" if name == "hermes" else ""
    frame = frame.checked(tools=bool(tools), user=user is not None, marks=marks)
    if tools:
        say(f"tools: {', '.join(tool.name for tool in tools)}; calls are read by {name}")
    return Turns(
        frame,
        parser,
        {tool.name: tool for tool in tools},
        Bench({tool.name: (tool.file, tool.name) for tool in tools}, limits),
        max_tool_calling_iterations,
        None if user is None else load_user(user, limits, sampling, lm.device),
        max_user_turns,
    )
