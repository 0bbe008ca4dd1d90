"""Microbatches -> gradients: what every policy that samples does in an update.

`batch.weight` makes the normalisation of a step (`fastpost.weights`), over all its completions and all their tokens:
those that never reach the model, having no gradient, keep their place in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastpost import Head, fused_loss, metrics
from fastpost.rollout.mismatch import mismatch
from fastpost.shared_prompt import AnyPack
from fastpost.trainers.balance import hidden_and_balance
from fastpost.trainers.config import Sampled
from fastpost.trainers.log import say
from fastpost.trainers.loop import autocast, the_device
from fastpost.trainers.objectives import Objective
from fastpost.trainers.world import ALONE, World


def say_mismatch(packs: Sequence[AnyPack]) -> None:
    """How far the sampler was from the policy that trains, from packs that have been through `backward`."""
    batches = [packed.batch for packed in packs if packed.batch.rollout_logp is not None]
    if batches:
        sampler = torch.cat([batch.rollout_logp[batch.kept] for batch in batches])
        say(mismatch(sampler, torch.cat([batch.old_logp[batch.kept] for batch in batches])).sentence)


def backward(
    model: Any, packs: Sequence[AnyPack], objective: Objective, tokens: int, config: Sampled, world: World = ALONE
) -> tuple[list[AnyPack], dict[str, float]]:
    """Adds the gradient of the packs; returns them with old_logp filled in, and means for the log.

    `tokens` are those of the whole step, of completions without a gradient too: where nothing was done nothing was
    clipped. Entropy and KL, which were not computed for them, are means over the rest.

    Packs without old_logp were sampled by this very policy: their old_logp is what it says now.
    """
    in_packs = sum(packed.num_tokens for packed in packs)
    total, seen, scored = 0.0, {}, []
    for packed in packs:
        with autocast(config):
            hidden, balance, of_router = world.through(partial(hidden_and_balance, model, packed, in_packs, config))
            loss, stats = fused_loss(
                objective.loss,
                hidden,
                Head.of(model),
                packed.batch,
                temperature=config.temperature,
                outputs=("entropy",),
                return_stats=True,
            )
        (loss + balance).backward()
        batch = packed.batch if packed.batch.old_logp is not None else replace(packed.batch, old_logp=stats.logp)
        scored.append(replace(packed, batch=batch))
        total = total + loss.detach()
        seen = metrics.joined(seen, objective.seen(stats, batch), of_router)
    if packs:
        skipped = tokens - sum(len(packed.batch.kept) for packed in packs)
        seen = metrics.joined(seen, metrics.unclipped(skipped, the_device()))
    return scored, {"loss": float(total)} | metrics.floats(seen)
