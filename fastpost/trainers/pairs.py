"""Pairs -> packs -> one fused loss of pairs, the mean over all pairs of a step: what DPO, CPO, SimPO and ORPO share.

A pair is never split: both of its sequences are in one pack, whole. So every loss sees them together, and the window's
mean does not depend on how it is cut into packs; but for `aot`, whose quantiles are of a microbatch.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastpost import Batch, Head, Loss, Stats, fused_loss, metrics
from fastpost.data import Counts, Pair, preference_examples
from fastpost.files import Rows
from fastpost.models.trunk import positions
from fastpost.packing import Packed, pack, placeholder
from fastpost.packing.subsets import with_known
from fastpost.trainers.balance import hidden_and_balance
from fastpost.trainers.config import Dpo, Pairs, Training
from fastpost.trainers.loop import autocast, bins, check_lengths, evaluating, the_device
from fastpost.trainers.start import Start
from fastpost.trainers.world import ALONE, World
from fastpost.weights import Window, sequence_mean

SHOWN = ("entropy", "top1", "mean_logp", "lse")  # statistics that only the log reads


@dataclass(frozen=True)
class Objective:
    """What is descended, what the log shows of it, and what gives a pack its ref_logp, if anything does."""

    loss: Loss  # with its knobs
    shown: Callable[[Stats, Batch], dict[str, metrics.Part]]
    reference: Callable[[Packed], Packed] | None = None


def read_pairs(begun: Start, config: Pairs, name: str, rows: Rows) -> tuple[list[Pair], Counts]:
    """The pairs of "train" or "eval", of which each fits in the model and in a pack."""
    room = positions(begun.model)
    soft = isinstance(config, Dpo) and config.soft_labels
    pairs, counts = preference_examples(
        rows, begun.tokenizer, config.max_length, positions=room, path=name, soft_labels=soft
    )
    check_lengths(lengths_of(pairs), room, config, unit=2)
    return pairs, counts


def tokens_of(pairs: Sequence[Pair]) -> int:
    """What the model reads of them."""
    return sum(lengths_of(pairs))


def backward(
    model: Any, window: Sequence[Pair], objective: Objective, config: Training, world: World = ALONE
) -> dict[str, float]:
    """Adds the gradient of the mean loss over all pairs of the window, and of a router's; returns means."""
    lengths = lengths_of(window)
    whole = Window(sum(len(e.predicted) for pair in window for e in pair.examples), 2 * len(window), world.size)
    seen = {}
    for rows in world.turns(world.share(bins(lengths, config, unit=2), lengths, unit=2)):
        packed = _packed([window[i // 2] for i in rows[::2]], objective)
        weight = sequence_mean(packed.batch, whole, objective.loss.unit)
        packed = replace(packed, batch=replace(packed.batch, weight=weight))
        with autocast(config):
            work = partial(losses_of, model, packed, objective.loss, sum(lengths) / world.size, config, SHOWN)
            loss, balance, stats, of_router = world.through(work)
        if torch.is_grad_enabled():
            (loss + balance).backward()
        of_step = {"loss": metrics.total(loss / world.size)}
        seen = metrics.joined(seen, of_step, objective.shown(stats, packed.batch), of_router)
    return metrics.floats(metrics.over_ranks(seen))


def losses_of(
    model: Any, packed: Packed, loss_function: Loss, tokens: float, config: Training, shown: Sequence[str]
) -> tuple[Tensor, Tensor | float, Stats, dict[str, metrics.Part]]:
    """What a pack adds to a step of so many tokens: its loss, and that of a router; with the statistics to be shown."""
    hidden, balance, of_router = hidden_and_balance(model, packed, tokens, config)
    loss, stats = fused_loss(loss_function, hidden, Head.of(model), packed.batch, outputs=shown, return_stats=True)
    return loss, balance, stats, of_router


@torch.no_grad()
def evaluate(
    model: Any, pairs: Sequence[Pair], objective: Objective, config: Pairs, world: World = ALONE
) -> dict[str, float]:
    """The same means over held-out pairs, without gradients."""
    with evaluating(model):
        values = backward(model, pairs, objective, config, world)
    return {f"eval_{name}": value for name, value in values.items()}


def with_reference(
    pairs: Sequence[Pair], reference: Callable[[Packed], Packed], config: Pairs, world: World = ALONE
) -> list[Pair]:
    """The pairs with the reference's log-probabilities of their tokens, in host memory: 4 bytes a token."""
    found: list[tuple[int, array[float]]] = []  # by the number of the sequence
    lengths = lengths_of(pairs)
    for rows in world.share(bins(lengths, config, unit=2), lengths, unit=2):
        sequences = _sequences([pairs[i // 2] for i in rows[::2]]) or placeholder(2)
        batch = reference(pack(sequences).to(the_device())).batch
        each = batch.ref_logp[batch.kept].cpu().split(batch.kept_lengths.tolist())
        found += [(i, array("f", logp.tolist())) for i, logp in zip(rows, each, strict=False)]
    known = dict(world.gathered(found))
    return [replace(pair, ref_logp=(known[2 * i], known[2 * i + 1])) for i, pair in enumerate(pairs)]


def _packed(pairs: Sequence[Pair], objective: Objective) -> Packed:
    """With ref_logp as it is known, or as the reference says now."""
    known = [logp for pair in pairs for logp in pair.ref_logp or ()]
    extra = {"ref_logp": known} if known else {}
    packed = pack(_sequences(pairs) or placeholder(2), **extra)
    sure = [pair.probability for pair in pairs if pair.probability is not None]
    if sure:
        packed = with_known(packed, probability=torch.tensor(sure))
    packed = packed.to(the_device())
    return packed if known or objective.reference is None else objective.reference(packed)


def _sequences(pairs: Sequence[Pair]) -> list[Any]:
    return list(chain.from_iterable(pair.examples for pair in pairs))


def lengths_of(pairs: Sequence[Pair]) -> list[int]:
    return [len(example.input_ids) for example in _sequences(pairs)]
