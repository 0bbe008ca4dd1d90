"""A reward model as a reward function: the score of prompt and completion together, at their last token.

Tokens are those that `fastpost reward` trains on: a text ends with EOS, a conversation is rendered by the model's own
chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        found = torch.empty(len(rows))
        lengths = [len(row) for row in rows]
        for part in plan(lengths, max(TOKENS, *lengths)):
            found[part] = self._scores([rows[i] for i in part])
        return found.tolist()

    def _ids(self, prompt: Any, completion: Any, i: int) -> list[int]:
        ids = whole(self.tokenizer, prompt + completion, {}, f"sample {i}").input_ids
        room = positions(self.model)
        if room is not None and len(ids) > room:
            raise ValueError(f"sample {i} has {len(ids)} tokens for a reward model of {room} positions")
        return ids

    @torch.no_grad()
    def _scores(self, rows: list[list[int]]) -> Tensor:  # (S,)
        packed = pack([Example(ids, [False] * len(ids)) for ids in rows]).to(causal_lm(self.model).device)
        ends = (packed.batch.lengths.cumsum(0) - 1).to(packed.input_ids.device)
        return scores(own_scalar(self.model, "the reward model"), hidden_states(self.model, packed)[0, ends]).cpu()


def reward_model(path: str | PathLike[str]) -> RewardModel:
    """Of a directory, where there is a GPU on that."""
    model, tokenizer = load_reward_model(path)
    model.requires_grad_(False).eval()
    return RewardModel(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)
