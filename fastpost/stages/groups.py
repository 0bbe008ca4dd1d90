"""What a stage makes of a prompt: answers, each with what was thought of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastpost.data import Messages, Prompt
from fastpost.rewards.texts import text_of


@dataclass(frozen=True)
class Answer:
    """A completion, and what was thought of it."""

    text: str  # of several turns what the policy said in them
    tokens: int  # of the policy, the end-of-sequence token among them
    finished: bool
    logp: float | None = None  # the sum over its tokens, as the sampler saw them; None: it did not say
    reward: float | None = None  # the weighted sum; None: nobody judged it, or no function applied
    rewards: Mapping[str, float | None] | None = None  # of each function
    ids: list[int] | None = None  # its tokens, where they were to be kept
    own: list[bool] | None = None  # which of them are the policy's; None: all
    messages: Messages | None = None  # of several turns, what tools and users said among them; None: one turn
    events: Mapping[str, int] | None = None  # what happened between turns, counted

    @property
    def last(self) -> str:
        """What it comes to: its text, or that of the last message."""
        return self.text if self.messages is None else text_of(self.messages)

    def to(self, prompt: Prompt) -> str | Messages:
        """As whoever judges it, or learns from it, reads it."""
        return prompt.answered(self.text) if self.messages is None else self.messages


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
