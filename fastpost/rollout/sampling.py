"""What is asked of a sampler, whichever it is, and what it gives back."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; temperature 0 is greedy.

    Logits meet repetition penalty, temperature, top-k, top-p and min-p in this order, each what the one before left.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float | None = None
    max_completion_length: int = 256  # tokens, EOS included
    seed: int = 0
    repetition_penalty: float = 1.0  # of tokens in the prompt and in the completion so far; 1: none
    stop: tuple[str, ...] = ()  # a completion ends with the token that completes one of them

    def __post_init__(self):
        in_range = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "at least 0 (0: all)"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            "max_completion_length": (self.max_completion_length >= 1, "at least 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0 (1: none)"),
            "stop": (isinstance(self.stop, tuple) and all(self.stop), "a tuple of strings, none of them empty"),
        }
        for name, (fits, right) in in_range.items():
            if not fits:
                raise ValueError(f"{name} must be {right}, got {getattr(self, name)!r}")

    @property
    def unfiltered(self) -> bool:
        """Whether tokens are drawn from the whole distribution at this temperature. Only then are log-probabilities of
        what they were drawn from those that a `Completion` holds."""
        filtered = self.top_k or self.top_p < 1 or self.min_p or self.repetition_penalty != 1
        return self.temperature > 0 and not filtered


@dataclass(frozen=True)
class Completion:
    """Generated tokens, the EOS among them, or those of the stop string, when `finished`.

    logp[i] is log p(ids[i]) as the sampler saw it: at the sampling temperature (greedy: 1) and over the whole
    vocabulary, before repetition penalty, top-k, top-p and min-p. It is what a trainer's logp at this temperature is
    compared with. Empty where the sampler did not say.

    One of several turns also holds what tools and users said: there own[i] is False and logp[i] NaN. No loss and no
    statistic is of those tokens.
    """

    ids: list[int]
    finished: bool
    logp: list[float] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)  # empty: all of them
    messages: list[dict[str, Any]] = field(default_factory=list)  # of all turns; empty: one, of its text
    events: dict[str, int] = field(default_factory=dict)  # what happened between turns, counted

    @property
    def mask(self) -> list[bool]:
        """Which tokens the policy sampled."""
        return self.own or [True] * len(self.ids)


@dataclass(frozen=True)
class Ends:
    """What a completion ends with."""

    tokens: frozenset[int]
    stop: tuple[str, ...] = ()
    tokenizer: Any = None  # needed for stop strings alone

    @property
    def window(self) -> int:
        """So many last tokens show a stop string that the very last one completed: a token is a byte or more, but for
        a few that are nothing."""
        return max((len(text.encode()) for text in self.stop), default=0) + 4

    def stopped(self, ids: Sequence[int]) -> bool:
        """Whether a stop string is in the text. Only the completion's own text counts, never the prompt's."""
        if not self.stop:
            return False
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self.stop)

    def length(self, ids: Sequence[int]) -> int | None:
        """Up to and with the first token that ends it; None where none does."""
        at = next((i + 1 for i, token in enumerate(ids) if token in self.tokens), None)
        if self.stopped(ids[:at]):
            # A text that has it keeps it, whatever follows.
            at = bisect_left(range(len(ids[:at])), True, key=lambda n: self.stopped(ids[:n]))
        return at

    def cut(self, ids: Sequence[int], logp: Sequence[float]) -> Completion:
        at = self.length(ids)
        return Completion(list(ids[:at]), at is not None, list(logp[:at]))
