"""A step in plain torch, with all logits, a row at a time: in float64 the truth, else the yardstick of the error rule.

sft   - sum log p / N                                over the N tokens of all completions
dpo   - mean log s(beta (d_w - d_l)), d = log p - log q summed over a completion         arXiv:2305.18290
grpo  - sum A p / sg(p) / N, on policy: no ratio is clipped                              arXiv:2402.03300, 2503.14476
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import step
import torch
import torch.nn.functional as F
from step import Row, Shape, Trainee
from torch import Tensor


def logp(model: Any, row: Row, shape: Shape) -> Tensor:  # (tokens of the completion,)
    with step.autocast(shape):
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits
    scored = logits[0, len(row.prompt) - 1 : -1]
    wide = scored.to(torch.promote_types(scored.dtype, torch.float32)).log_softmax(-1)
    return wide.gather(-1, torch.tensor(row.completion)[:, None])[:, 0]


def advantages(rows: Sequence[Row], group: int) -> Tensor:  # (rows,)
    rewards = torch.tensor([row.reward for row in rows], dtype=torch.float64).view(-1, group)
    return ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()


def parts(method: str, model: Any, reference: Any, rows: Sequence[Row], shape: Shape) -> Iterator[Tensor]:
    """Of a unit at a time, what it adds to the loss."""
    if method == "dpo":
        for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
            with torch.no_grad():
                before = [logp(reference, row, shape).sum() for row in (chosen, rejected)]
            after = [logp(model, row, shape).sum() for row in (chosen, rejected)]
            ahead = (after[0] - before[0]) - (after[1] - before[1])
            yield -F.logsigmoid(step.BETA * ahead)[None] / (len(rows) // 2)
        return
    advantage = advantages(rows, step.alike(method, shape)) if method == "grpo" else None
    for i, row in enumerate(rows):
        each = logp(model, row, shape)
        if advantage is not None:
            each = (each - each.detach()).exp() * advantage[i].to(each.dtype)
        yield -each / step.completion_tokens(rows)


def accumulate(method: str, model: Any, reference: Any, rows: Sequence[Row], shape: Shape) -> Tensor:  # (tokens,)
    """Or (pairs,)."""
    found = []
    for part in parts(method, model, reference, rows, shape):
        part.sum().backward()
        found.append(part.detach())
    return torch.cat(found)


def made(method: str, shape: Shape, *, dtype: torch.dtype = torch.float32) -> Trainee:
    """float64 is meant for a shape whose own dtype is float32: autocast narrows nothing then."""
    model, rows = step.model(shape, "sdpa").to(dtype), step.given(method, shape)
    reference = step.model(shape, "sdpa", reference=True).to(dtype) if method == "dpo" else None
    return Trainee(
        model, partial(accumulate, method, model, reference, rows, shape), step.tokens(rows), step.adamw(model)
    )
