"""A reward model as a reward function: the score of prompt and completion together, at their last token.

Tokens are those that `fastpost reward` trains on: a text ends with EOS, a conversation is rendered by the model's own
chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from fastpost.data.chat import whole
from fastpost.models.reward_model import load_reward_model
from fastpost.models.scalar import own_scalar, scores
from fastpost.models.trunk import causal_lm, hidden_states, positions
from fastpost.packing import Example, pack, plan

TOKENS = 16_384  # of a pack: what is scored is not kept


@dataclass(frozen=True)
class RewardModel:
    """f(prompts, completions, **columns) -> scores."""

    model: Any
    tokenizer: Any

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """The score of each."""
        rows = [self._ids(p, c, i) for i, (p, c) in enumerate(zip(prompts, completions, strict=True))]
        return torch.cat(scores_at(self.model, rows, [[len(row) - 1] for row in rows])).tolist()

    def _ids(self, prompt: Any, completion: Any, i: int) -> list[int]:
        ids = whole(self.tokenizer, prompt + completion, {}, f"sample {i}").input_ids
        check_room(self.model, len(ids), f"sample {i}")
        return ids


def check_room(model: Any, length: int, where: str) -> None:
    """ValueError where a model cannot read so many tokens."""
    room = positions(model)
    if room is not None and length > room:
        raise ValueError(f"{where} has {length} tokens for a reward model of {room} positions")


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
