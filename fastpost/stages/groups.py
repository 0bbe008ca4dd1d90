"""What a stage makes of a prompt: answers, each with what was thought of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """A completion, and what was thought of it."""

    text: str
    tokens: int  # the end-of-sequence token among them
    finished: bool
    logp: float | None = None  # the sum over its tokens, as the sampler saw them; None: it did not say
    reward: float | None = None  # the weighted sum; None: nobody judged it, or no function applied
    rewards: Mapping[str, float | None] | None = None  # of each function
    ids: list[int] | None = None  # its tokens, where they were to be kept


@dataclass(frozen=True)
class Group:
    """A prompt and its answers."""

    key: int  # of the prompt: its row
    prompt: Any  # text or messages
    columns: Mapping[str, Any]  # what else the row has
    answers: list[Answer]


def judged(answers: Iterable[Answer]) -> list[tuple[float, Answer]]:
    """Those that a reward function applied to, each behind its reward."""
    return [(answer.reward, answer) for answer in answers if answer.reward is not None]
