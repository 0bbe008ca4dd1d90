"""What every policy that samples does in a round: rollouts; then microbatches -> gradients.

`batch.weight` makes the normalisation of a step (`fastpost.weights`), over all its completions and all their tokens:
those that never reach the model, having no gradient, keep their place in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpost import Head, Stats, fused_loss, metrics, token_stats
from fastpost.metrics import Part
from fastpost.models.trunk import hidden_states
from fastpost.packing import Packed
from fastpost.packing.subsets import with_known
from fastpost.rollout.mismatch import mismatch
from fastpost.shared_prompt import AnyPack
from fastpost.trainers.balance import hidden_and_balance
from fastpost.trainers.config import Sampled
from fastpost.trainers.episodes import columns, counts
from fastpost.trainers.log import say
from fastpost.trainers.loop import autocast, evaluating, seed_of, the_device
from fastpost.trainers.objectives import Objective
from fastpost.trainers.rollouts import Rollouts, first_group, greedy_reward, roll_out, rollout_metrics
from fastpost.trainers.run import Run
from fastpost.trainers.stage import Stage
from fastpost.trainers.world import ALONE, World


def next_rollouts(run: Run, stage: Stage, count: int | None = None) -> Rollouts:
    """Completions of so many prompts, or of those of a round, the next ones; samples are keyed by the step and by the
    place of the prompt among all that were ever asked for."""
    first, rows, asked = run.taken, run.take(count), stage.data["train"]
    keys = range(first, first + len(rows))
    task = stage.task.seeded(seed_of(stage.config.seed, run.step))
    task.sampler.update(stage.model)
    return roll_out(task, [asked[i] for i in rows], stage.config.num_generations, run.step, keys)


def learn(
    run: Run,
    stage: Stage,
    objective: Objective,
    packs: list[AnyPack],
    whole: Packed,
    rollouts: Rollouts,
    facts: Mapping[str, float] | None = None,
) -> None:
    """The optimizer steps of a round on its microbatches; `whole` is what they are of. The log has these facts, too."""
    facts = rollout_metrics(rollouts, stage.config.num_generations) | dict(facts or {})
    tokens = int(counts(whole).sum())
    run.clock.spend(rollouts.seconds)
    for _ in range(run.iterations):
        packs, values = backward(stage.model, packs, objective, tokens, stage.config, run.world)
        run.update(facts | values, rollouts.num_tokens, learns=bool(packs))
    if run.first_round:
        say_mismatch(packs, run.world)


def look(run: Run, stage: Stage, rollouts: Rollouts) -> None:
    """What is due at the end of a round: an evaluation, samples for the reader."""
    if run.evaluates and "eval" in stage.data:
        run.note({"eval_reward": greedy_reward(stage.task, stage.data["eval"])})
    run.show(first_group(rollouts, stage.config.num_generations, run.step))


def said_by_policy(
    whole: Packed, stage: Stage, outputs: tuple[str, ...] = ("logp",), world: World = ALONE
) -> list[Tensor]:  # (T,) each
    """Statistics of every token under the policy as it is, from a pass of its own."""

    def said(packed: Packed) -> list[Tensor]:
        hidden, head = hidden_states(stage.model, packed)[0], Head.of(stage.model)
        stats = token_stats(hidden, head, packed.batch.target, outputs=outputs, temperature=stage.config.temperature)
        return [getattr(stats, name) for name in outputs]

    with evaluating(stage.model):
        return columns(whole, stage.config, lambda packed: world.through(partial(said, packed)), world)


def scored(whole: Packed, stage: Stage, world: World = ALONE) -> Packed:
    """With old_logp, and ref_logp where there is a reference."""
    (old_logp,) = said_by_policy(whole, stage, world=world)
    whole, reference = with_known(whole, old_logp=old_logp), stage.reference
    if reference is None:
        return whole
    temperature = stage.config.temperature
    (ref_logp,) = columns(whole, stage.config, lambda p: [reference.scored(p, temperature).batch.ref_logp], world)
    return with_known(whole, ref_logp=ref_logp)


def say_mismatch(packs: Sequence[AnyPack], world: World = ALONE) -> None:
    """How far the samplers were from the policy that trains, from packs of which each process knows old_logp."""
    batches = [p.batch for p in packs if p.batch.rollout_logp is not None and len(p.batch.kept)]
    found = world.gathered([(b.rollout_logp[b.kept].cpu(), b.old_logp[b.kept].cpu()) for b in batches])
    if found:
        sampler, trainer = zip(*found, strict=True)
        say(mismatch(torch.cat(sampler), torch.cat(trainer)).sentence)


def backward(
    model: Any, packs: Sequence[AnyPack], objective: Objective, tokens: int, config: Sampled, world: World = ALONE
) -> tuple[list[AnyPack], dict[str, float]]:
    """Adds the gradient of the packs; returns them with old_logp filled in, and means for the log.

    `tokens` are those of the whole step, of completions without a gradient too: where nothing was done nothing was
    clipped. Entropy and KL, which were not computed for them, are means over the rest.

    Packs without old_logp were sampled by this very policy: their old_logp is what it says now.
    """
    if not packs:  # on no process
        return [], {"loss": 0.0}
    own = torch.tensor([[packed.num_tokens, len(packed.batch.kept)] for packed in packs]).sum(0)
    read, reached = world.summed(own).tolist()
    seen, scored = {}, []
    for packed in world.turns(packs):
        with autocast(config):
            work = partial(_losses, model, packed, objective, read / world.size, config)
            loss, balance, stats, of_router = world.through(work)
        (loss + balance).backward()
        batch = packed.batch if packed.batch.old_logp is not None else replace(packed.batch, old_logp=stats.logp)
        scored.append(replace(packed, batch=batch))
        of_step = {"loss": metrics.total(loss / world.size)}
        seen = metrics.joined(seen, of_step, objective.seen(stats, batch), of_router)
    skipped = metrics.unclipped(tokens - reached, the_device())
    return scored, metrics.floats(metrics.joined(metrics.over_ranks(seen), skipped))


def _losses(
    model: Any, packed: AnyPack, objective: Objective, tokens: float, config: Sampled
) -> tuple[Tensor, Tensor | float, Stats, dict[str, Part]]:
    """What a pack adds to a step whose packs have so many tokens: its loss, and that of a router."""
    hidden, balance, of_router = hidden_and_balance(model, packed, tokens, config)
    loss, stats = fused_loss(
        objective.loss,
        hidden,
        Head.of(model),
        packed.batch,
        temperature=config.temperature,
        outputs=("entropy",),
        return_stats=True,
    )
    return loss, balance, stats, of_router
