"""Of verbs whose policy may have several turns: what answers it between them."""

from __future__ import annotations

from dataclasses import dataclass

from fastpost.trainers.config.groups import ROLLOUT
from fastpost.trainers.options import option
from fastpost.turns.bench import Limits


@dataclass(frozen=True, kw_only=True)
class Conversing:
    """Tools, and a user."""

    tools: tuple[str, ...] = option(
        (), ROLLOUT, "functions that the policy may call, file.py:function, with type hints and docstrings; repeatable"
    )
    max_tool_calling_iterations: int | None = option(
        None, ROLLOUT, "turns of a completion that call tools; default: as many as max_completion_length holds", least=0
    )
    tool_timeout: float = option(10.0, ROLLOUT, "seconds that a call may take", above=0)
    tool_memory_mb: int = option(4096, ROLLOUT, "MiB of address space that a call may take", above=0)
    tool_output_bytes: int = option(
        4096, ROLLOUT, "bytes of what a tool says; the rest is left out, and noted", above=0
    )
    user: str | None = option(
        None, ROLLOUT, "who answers as the user between turns: file.py:function, or the directory of a model"
    )
    max_user_turns: int = option(4, ROLLOUT, "times that the user answers in a completion", above=0)

    @property
    def converses(self) -> bool:
        """Whether a completion may have several turns, by these fields."""
        return bool(self.tools or self.user)

    @property
    def tool_limits(self) -> Limits:
        return Limits(self.tool_timeout, self.tool_memory_mb, self.tool_output_bytes)
