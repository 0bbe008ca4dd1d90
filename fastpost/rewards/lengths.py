"""Shaping by the tokens of a completion: too many of them, and the same ones again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SoftOverlongPunishment:
    """0 up to L = max_completion_len - soft_punish_cache tokens, then (L - length) / soft_punish_cache, and -1 beyond
    max_completion_len. DAPO, arXiv:2503.14476, equation 13."""

    max_completion_len: int
    soft_punish_cache: int

    def __post_init__(self) -> None:
        if not 0 <= self.soft_punish_cache <= self.max_completion_len or self.max_completion_len < 1:
            raise ValueError(
                "soft_punish_cache must be from 0 to max_completion_len tokens, "
                f"got {self.soft_punish_cache} and {self.max_completion_len}"
            )

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [self._of(len(ids)) for ids in completion_ids]

    def _of(self, length: int) -> float:
        beyond = length - (self.max_completion_len - self.soft_punish_cache)
        if beyond <= 0:
            return 0.0
        return -1.0 if length > self.max_completion_len else -beyond / self.soft_punish_cache


@dataclass(frozen=True)
class RepetitionPenalty:
    """max_penalty * (1 - different n-grams / n-grams), of tokens; 0 where there is none. arXiv:2502.03373, C.2."""

    ngram_size: int = 3
    max_penalty: float = -1.0

    def __post_init__(self) -> None:
        if self.ngram_size < 1:
            raise ValueError(f"ngram_size must be at least 1 token, got {self.ngram_size}")
        if self.max_penalty > 0:
            raise ValueError(f"max_penalty must be at most 0, got {self.max_penalty}")

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [self.max_penalty * self._repeated(ids) for ids in completion_ids]

    def _repeated(self, ids: Sequence[int]) -> float:
        count = len(ids) - self.ngram_size + 1
        different = {tuple(ids[i : i + self.ngram_size]) for i in range(count)}
        return 1 - len(different) / count if count > 0 else 0.0
