"""Sampling by transformers' `generate`: prompts in, completions out, in prompt-major order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float | None = None
    max_completion_length: int = 256  # tokens, EOS included
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """Generated tokens, the EOS among them when `finished`."""

    ids: list[int]
    finished: bool


def generate(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    num_generations: int = 1,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """num_generations completions of each prompt: those of prompt i are at [i * num_generations : (i + 1) * num_generations].

    `batch_size` counts completions decoded together; `progress` is told how many were just finished.
    """
    raise NotImplementedError
