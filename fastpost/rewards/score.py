"""Calling reward functions and checking what they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Reward:
    """A reward function and the name it has in the metrics: f(prompts, completions, completion_ids, **columns)."""

    name: str
    function: Callable[..., Any]


@dataclass(frozen=True)
class Scores:
    """rewards: the weighted sum a sample; by_function[name]: what each function gave, NaN where not applicable."""

    rewards: Tensor  # (S,) fp32; NaN where no function applied
    by_function: dict[str, Tensor]  # (S,) each
    metrics: dict[str, float]  # what the functions logged by log_metric, averaged


def load_reward(spec: str) -> Reward:
    """A built-in name, or `file.py:function`."""
    raise NotImplementedError


def score(
    functions: Sequence[Reward],
    weights: Sequence[float] | None,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    *,
    step: int = 0,
) -> Scores:
    """Rewards of S samples; columns[name][i] belongs to sample i."""
    raise NotImplementedError
