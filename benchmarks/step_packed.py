"""A step as fastpost takes it: rows end to end in packs, the logits never held; of a group, the prompt once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import step
import torch
from step import Row, Shape, Trainee
from torch import Tensor

from fastpost import Batch, Head, fused_loss, losses, token_stats, weights
from fastpost.advantages import group_centred
from fastpost.models import attention
from fastpost.models.trunk import hidden_states
from fastpost.packing import Example, Packed, pack, plan
from fastpost.shared_prompt import SharedPack, share_prompts
from fastpost.weights import Window

LOSSES = {"sft": losses.sft, "dpo": losses.dpo, "grpo": losses.grpo}
KNOBS = {"sft": {}, "dpo": {"beta": step.BETA}, "grpo": {}}
WEIGHTS = {"sft": weights.token_mean, "dpo": partial(weights.sequence_mean, unit="pair"), "grpo": weights.dapo}
OUTPUTS = {"sft": ("entropy", "top1"), "dpo": ("entropy", "top1"), "grpo": ("entropy",)}  # what TRL logs of them


def units(method: str, rows: Sequence[Row], shape: Shape, shared: bool) -> tuple[int, list[int]]:
    """How many adjacent rows are never split, and what each such unit adds to a pack, in tokens."""
    size = step.alike(method, shape) if shared or method == "dpo" else 1
    prompts = 1 if shared else size
    firsts = range(0, len(rows), size)
    return size, [prompts * len(rows[i].prompt) + step.completion_tokens(rows[i : i + size]) for i in firsts]


def packs(method: str, rows: Sequence[Row], shape: Shape, shared: bool) -> Iterator[Packed | SharedPack]:
    """The rows in as few packs as best fit finds, weighed as one step."""
    size, lengths = units(method, rows, shape, shared)
    window = Window(step.completion_tokens(rows), len(rows))
    rewards = torch.tensor([row.reward for row in rows])
    extra = {"advantage": group_centred(rewards, shape.group)} if method == "grpo" else {}
    for found in plan(lengths, shape.max_tokens):
        chosen = list(chain.from_iterable(range(u * size, u * size + size) for u in found))
        packed = pack([_example(rows[i]) for i in chosen], **{name: x[chosen] for name, x in extra.items()})
        packed = share_prompts(packed, size) if shared else packed
        yield replace(packed, batch=replace(packed.batch, weight=WEIGHTS[method](packed.batch, window)))


def _example(row: Row) -> Example:
    return Example(row.ids, [False] * len(row.prompt) + [True] * len(row.completion))


def accumulate(
    method: str, model: Any, reference: Any, packs: Callable[[], Iterable[Packed | SharedPack]], shape: Shape
) -> Tensor:  # (number of packs,)
    """Adds the gradient of every pack; returns its share of the loss."""
    parts = []
    for packed in packs():
        batch = packed.batch if reference is None else _scored(reference, packed, shape)
        with step.autocast(shape):
            hidden = hidden_states(model, packed)
            loss, _ = fused_loss(
                LOSSES[method],
                hidden,
                Head.of(model),
                batch,
                outputs=OUTPUTS[method],
                return_stats=True,
                **KNOBS[method],
            )
        loss.backward()
        parts.append(loss.detach())
    return torch.stack(parts)


@torch.no_grad()
def _scored(reference: Any, packed: Packed | SharedPack, shape: Shape) -> Batch:
    """The pack's batch with ref_logp."""
    with step.autocast(shape):
        hidden = hidden_states(reference, packed)
        stats = token_stats(hidden[0], Head.of(reference), packed.batch.target)
    return replace(packed.batch, ref_logp=stats.logp)


def made(method: str, shape: Shape, *, shared: bool = False) -> Trainee:
    """`shared`: the prompt of a group is there once."""
    model, rows = step.model(shape, attention.register()), step.given(method, shape)
    reference = step.model(shape, attention.NAME, reference=True) if method == "dpo" else None
    packed = partial(packs, method, rows, shape, shared)
    return Trainee(
        model,
        partial(accumulate, method, model, reference, packed, shape),
        sum(each.input_ids.numel() for each in packed()),
        step.adamw(model),
    )
