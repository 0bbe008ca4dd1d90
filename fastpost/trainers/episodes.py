"""Rollouts as one pack on the host, with what is known of every token of a step: what its log-probabilities were, what
it is worth. Microbatches are subsets of it, and what a pass of a model says of them is laid back into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, compress

import torch
from torch import Tensor

from fastpost.packing import Example, Packed, pack
from fastpost.packing.subsets import positions_of, stand_in, subset
from fastpost.shared_prompt import AnyPack, share_prompts
from fastpost.trainers.config import Sampled
from fastpost.trainers.loop import autocast, bins, the_device
from fastpost.trainers.objectives import Objective
from fastpost.trainers.rollouts import Rollouts
from fastpost.trainers.sharing import Part, parts_of_packs
from fastpost.trainers.stage import Stage
from fastpost.trainers.world import ALONE, World
from fastpost.weights import Window


def episodes(rollouts: Rollouts, config: Sampled) -> Packed:
    """Every completion behind its prompt, in their order; rollout_logp is the sampler's, where it gave one. What a tool
    or a user said in one is read, and not predicted."""
    kept = [c.finished or not config.mask_truncated_completions for c in rollouts.completions]
    masks = [[own and k for own in c.mask] for c, k in zip(rollouts.completions, kept, strict=True)]
    examples = [
        Example([*p.input_ids, *c.ids], [False] * len(p.input_ids) + mask)
        for p, c, mask in zip(rollouts.prompts, rollouts.completions, masks, strict=True)
    ]
    said = [c.logp or [torch.nan] * len(c.ids) for c in rollouts.completions]
    return pack(examples, rollout_logp=[[*compress(x, mask)] for x, mask in zip(said, masks, strict=True)])


def counts(whole: Packed) -> Tensor:  # (S,)
    """Tokens of each sequence that the loss is about."""
    assert whole.batch.kept_lengths is not None
    return whole.batch.kept_lengths


def window_of(whole: Packed, rows: Sequence[int] | None = None, world: World = ALONE) -> Window:
    """The step that these sequences are, or all; those without a gradient, too. One that is masked whole counts."""
    of_rows = counts(whole) if rows is None else counts(whole)[torch.as_tensor(rows)]
    return Window(int(of_rows.sum()), len(of_rows), world.size)


def microbatches(whole: Packed, rows: Sequence[int], config: Sampled, world: World = ALONE) -> list[Packed]:
    """These sequences in packs of the config's size, this process' own, on its device."""
    lengths = whole.batch.lengths.tolist()
    lengths = [lengths[row] for row in rows]
    packs = world.share(bins(lengths, config), lengths)
    return [of_rows(whole, [rows[i] for i in each]).to(the_device()) for each in packs]


def of_rows(whole: Packed, rows: Sequence[int]) -> Packed:
    """These sequences alone; of none of them, a placeholder."""
    return subset(whole, rows) if rows else stand_in(whole)


def _of_shared_prompts(
    whole: Packed, rows: Sequence[int], config: Sampled, rollouts: Rollouts, world: World
) -> list[AnyPack]:
    """The same, those of one prompt together, behind the one prompt."""
    packs = parts_of_packs(rows, rollouts, config)
    parts = [*chain(*packs)]
    number = {part[0]: i for i, part in enumerate(parts)}
    own = world.share([[number[part[0]] for part in pack] for pack in packs], [_read(part, rollouts) for part in parts])
    return [_of_parts(whole, [parts[i] for i in each]).to(the_device()) for each in own]


def _of_parts(whole: Packed, parts: Sequence[Part]) -> AnyPack:
    packed = of_rows(whole, [*chain(*parts)])
    return share_prompts(packed, [len(part) for part in parts]) if parts else packed


def _read(part: Part, rollouts: Rollouts) -> int:
    """How many tokens the model reads of it."""
    return len(rollouts.prompts[part[0]].input_ids) + sum(len(rollouts.completions[i].ids) for i in part)


def packs_of(
    whole: Packed, objective: Objective, stage: Stage, rollouts: Rollouts, world: World = ALONE
) -> list[AnyPack]:
    """The completions that can have a gradient, in weighted microbatches."""
    loss, batch = objective.loss, whole.batch
    idle = None if loss.idle is None else loss.idle(batch, loss.knobs or {})
    moved = batch.target != -100 if idle is None else (batch.target != -100) & ~idle
    live = batch.per_sequence(moved.float()).nonzero()[:, 0].tolist()
    if stage.shared:
        packs: Sequence[AnyPack] = _of_shared_prompts(whole, live, stage.config, rollouts, world)
    else:
        packs = microbatches(whole, live, stage.config, world)
    return weighted(packs, objective, window_of(whole, world=world))


def weighted(packs: Sequence[AnyPack], objective: Objective, window: Window) -> list[AnyPack]:
    """The microbatches of a step, each with its weights in it."""
    weights = [objective.weigh(packed.batch, window, len(packs)) for packed in packs]
    return [replace(p, batch=replace(p.batch, weight=w)) for p, w in zip(packs, weights, strict=True)]


@torch.no_grad()
def columns(
    whole: Packed, config: Sampled, said: Callable[[Packed], Sequence[Tensor]], world: World = ALONE
) -> list[Tensor]:  # (T,) each, fp32 on the host
    """What `said` has to say of each token, (T,) tensors of a microbatch, of all sequences; 0 where nothing is said."""
    lengths = whole.batch.lengths
    found: list[Tensor] = []
    for rows in world.share(bins(lengths.tolist(), config), lengths.tolist()):
        with autocast(config):
            given = said(of_rows(whole, rows).to(the_device()))
        found = found or [torch.zeros(whole.num_tokens) for _ in given]
        for column, numbers in zip(found, given, strict=True) if rows else ():
            column[positions_of(lengths, rows)] = numbers.float().cpu()
    return [world.summed(column) for column in found]
