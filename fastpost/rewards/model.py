"""A reward model as a reward function: the score of prompt and completion together, at their last token.

Tokens are those that `fastpost reward` trains on: a text ends with EOS, a conversation is rendered by the model's own
chat template. What is longer than the model's positions is not judged (None), and counted: even a completion that had
room as tokens may have none as a text, where it was cut off in the middle of a character, say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from fastpost.data.chat import rendered, whole
from fastpost.models.reward_model import load_reward_model
from fastpost.models.scalar import own_scalar, scores
from fastpost.models.trunk import causal_lm, hidden_states, positions
from fastpost.packing import Example, pack, plan

TOKENS = 16_384  # of a pack: what is scored is not kept
Log = Callable[[str, float], None]


@dataclass(frozen=True)
class RewardModel:
    """f(prompts, completions, **columns) -> scores."""

    model: Any
    tokenizer: Any

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], log_metric: Log | None = None, **columns: Any
    ) -> list[float | None]:
        """The score of each."""
        both = zip(prompts, completions, strict=True)
        rows = [self._ids(p, c, template_row(columns, i), i) for i, (p, c) in enumerate(both)]
        said = scores_where_there_is_room(self.model, rows, [[len(row) - 1] for row in rows])
        log_too_long(said, log_metric)
        return [None if each is None else each.item() for each in said]

    def _ids(self, prompt: Any, completion: Any, row: dict[str, Any], i: int) -> list[int]:
        return whole(self.tokenizer, prompt + completion, row, f"sample {i}").input_ids


def template_row(columns: Mapping[str, Sequence[Any]], i: int) -> dict[str, Any]:
    """Of the columns what the chat template reads of row i, which a model was trained with."""
    return {name: values[i] for name, values in rendered(columns).items()}


def log_too_long(said: Sequence[Tensor | None], log_metric: Log | None) -> None:
    if log_metric is not None and said:
        log_metric("reward_model/too_long", sum(each is None for each in said) / len(said))


def scores_where_there_is_room(
    model: Any, rows: Sequence[list[int]], ends: Sequence[Sequence[int]]
) -> list[Tensor | None]:
    """The same, and None of sequences that are longer than the model's positions."""
    room = positions(model)
    fit = [i for i, row in enumerate(rows) if room is None or len(row) <= room]
    said = scores_at(model, [rows[i] for i in fit], [ends[i] for i in fit]) if fit else []
    found = dict(zip(fit, said, strict=True))
    return [found.get(i) for i in range(len(rows))]


@torch.no_grad()
def scores_at(model: Any, rows: Sequence[list[int]], ends: Sequence[Sequence[int]]) -> list[Tensor]:
    """The scores of sequences of tokens at these places of each."""
    found: dict[int, Tensor] = {}
    lengths = [len(row) for row in rows]
    for part in plan(lengths, max(TOKENS, *lengths)):
        packed = pack([Example(rows[i], [False] * len(rows[i])) for i in part]).to(causal_lm(model).device)
        starts = accumulate((lengths[i] for i in part), initial=0)
        at = [start + end for start, i in zip(starts, part, strict=False) for end in ends[i]]
        said = scores(own_scalar(model, "the reward model"), hidden_states(model, packed)[0, at]).cpu()
        found |= zip(part, said.split([len(ends[i]) for i in part]), strict=True)
    return [found[i] for i in range(len(rows))]


def reward_model(path: str | PathLike[str]) -> RewardModel:
    """Of a directory, where there is a GPU on that."""
    model, tokenizer = load_reward_model(path)
    model.requires_grad_(False).eval()
    return RewardModel(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)
