"""A process reward model as a reward function: how probably each step of a completion is right, and one number of all.

  min      the weakest step (arXiv:2312.08935)
  product  that all are right, if they were independent (arXiv:2305.20050)
  last     the last one, by which all before it have been read
  dense    each at the token where it ends, for a policy that learns by that; where one number is shown, their mean

`--reward DIR` takes the least, `--reward DIR:product` another. Steps are cut and laid out as `fastpost prm` trains on
them: at its separator, which stands behind each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from statistics import fmean
from typing import Any

import torch

from fastpost.data.steps import laid_out, prompt_ids, steps_of
from fastpost.models.reward_model import load_reward_model, step_separator
from fastpost.rewards.model import Log, log_too_long, scores_where_there_is_room, template_row
from fastpost.rewards.texts import text_of
from fastpost.types import nearest

DENSE = "dense"
WAYS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "product": math.prod,
    "last": lambda each: each[-1],
    DENSE: fmean,
}


@dataclass(frozen=True)
class StepRewards:
    """f(prompts, completions, **columns) -> rewards, between 0 and 1."""

    model: Any
    tokenizer: Any
    separator: str
    way: str = "min"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], log_metric: Log | None = None, **columns: Any
    ) -> list[float | None]:
        """One number each."""
        found = self.of_steps(prompts, completions, log_metric, **columns)
        return [WAYS[self.way](each) if each else None for each in found]

    def of_steps(
        self, prompts: Sequence[Any], completions: Sequence[Any], log_metric: Log | None = None, **columns: Any
    ) -> list[list[float]]:
        """The probability of each step that it is right; none of a completion for which the model has no room."""
        both = zip(prompts, completions, strict=True)
        laid = [self._laid(p, c, template_row(columns, i), i) for i, (p, c) in enumerate(both)]
        said = scores_where_there_is_room(self.model, [ids for ids, _ in laid], [ends for _, ends in laid])
        log_too_long(said, log_metric)
        return [[] if each is None else each.sigmoid().tolist() for each in said]

    def _laid(self, prompt: Any, completion: Any, row: dict[str, Any], i: int) -> tuple[list[int], list[int]]:
        begun = prompt_ids(self.tokenizer, prompt, row, f"sample {i}")
        steps = steps_of(text_of(completion), self.separator)
        return laid_out(self.tokenizer, begun, steps, self.separator)


def step_rewards(path: str | PathLike[str], way: str = "min") -> StepRewards:
    """Of a directory that `fastpost prm` left, where there is a GPU on that."""
    separator = step_separator(path)
    if separator is None:
        raise ValueError(f"{str(path)!r} does not score steps: it has no prm.json, as fastpost prm leaves it")
    if way not in WAYS:
        raise ValueError(f"steps become a reward by {', '.join(WAYS)}, got {way!r}{nearest(way, list(WAYS))}")
    model, tokenizer = load_reward_model(path)
    model.requires_grad_(False).eval()
    return StepRewards(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, separator, way)
