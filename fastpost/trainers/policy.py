"""Rollouts -> packs -> gradients: the second half of a step of policy optimisation.

`batch.weight` makes the normalisation of a step (`fastpost.weights`), over all its completions and all their tokens:
those that never reach the model, having no gradient, keep their place in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor

from fastpost import Batch, Head, Loss, fused_loss, losses, metrics, weights
from fastpost.packing import Example, Packed, pack
from fastpost.shared_prompt import AnyPack, SharedPack, share_prompts
from fastpost.trainers.balance import hidden_and_balance
from fastpost.trainers.config import Grpo
from fastpost.trainers.loop import autocast, bins, the_device
from fastpost.trainers.rollouts import Rollouts
from fastpost.trainers.sharing import Part, parts_of_packs
from fastpost.weights import Window

LOSSES: dict[str, Loss] = {"token": losses.grpo, "sequence": losses.gspo}  # by importance_sampling_level


def policy_packs(
    rollouts: Rollouts,
    advantages: Tensor,  # (S,)
    config: Grpo,
    *,
    shared: bool = False,
) -> list[AnyPack]:
    """The completions that can have a gradient, packed with their advantages and weights; `shared`: those of a prompt
    together, behind the one prompt."""
    examples = [
        _example(prompt.input_ids, completion.ids, completion.finished or not config.mask_truncated_completions)
        for prompt, completion in zip(rollouts.prompts, rollouts.completions, strict=True)
    ]
    counts = [len(example.predicted) for example in examples]
    window = Window(sum(counts), len(examples))
    live = [i for i in range(len(examples)) if counts[i] and (config.beta or advantages[i])]
    if shared:
        found = [_shared(parts, examples, advantages) for parts in parts_of_packs(live, rollouts, config)]
    else:
        lengths = [len(examples[i].input_ids) for i in live]
        found = [_pack([live[b] for b in rows], examples, advantages) for rows in bins(lengths, config)]
    return [_weighted(packed, window, config).to(the_device()) for packed in found]


def predicted_tokens(rollouts: Rollouts, config: Grpo) -> int:
    """How many tokens the loss of a step is about, a gradient or not."""
    counted = [c for c in rollouts.completions if c.finished or not config.mask_truncated_completions]
    return max(1, sum(len(completion.ids) for completion in counted))


def _example(prompt: list[int], completion: list[int], kept: bool) -> Example:
    return Example([*prompt, *completion], [False] * len(prompt) + [kept] * len(completion))


def _pack(rows: list[int], examples: Sequence[Example], advantages: Tensor) -> Packed:
    return pack([examples[i] for i in rows], advantage=advantages[rows])


def _shared(parts: Sequence[Part], examples: Sequence[Example], advantages: Tensor) -> SharedPack:
    return share_prompts(_pack([*chain(*parts)], examples, advantages), [len(part) for part in parts])


def _weighted(packed: AnyPack, window: Window, config: Grpo) -> AnyPack:
    return replace(packed, batch=replace(packed.batch, weight=_weight(packed.batch, window, config)))


def _weight(batch: Batch, window: Window, config: Grpo) -> Tensor:  # (U,)
    unit = LOSSES[config.importance_sampling_level].unit
    if config.loss_type == "dr_grpo":
        return weights.dr_grpo(batch, config.max_completion_length, window, unit)
    return {"dapo": weights.dapo, "grpo": weights.grpo}[config.loss_type](batch, window, unit)


def backward(model: Any, packs: Sequence[AnyPack], tokens: int, config: Grpo) -> tuple[list[AnyPack], dict[str, float]]:
    """Adds the gradient of the packs; returns them with old_logp filled in, and means for the log.

    `tokens` are those of the whole step, of completions without a gradient too: where nothing was done nothing was
    clipped. Entropy and KL, which were not computed for them, are means over the rest.

    Packs without old_logp were sampled by this very policy: their old_logp is what it says now.
    """
    loss_function = LOSSES[config.importance_sampling_level]
    clip = {"epsilon": config.epsilon, "epsilon_high": config.epsilon_high}
    in_packs = sum(packed.num_tokens for packed in packs)
    total, seen, scored = 0.0, {}, []
    for packed in packs:
        with autocast(config):
            hidden, balance, of_router = hidden_and_balance(model, packed, in_packs, config)
            loss, stats = fused_loss(
                loss_function,
                hidden,
                Head.of(model),
                packed.batch,
                temperature=config.temperature,
                outputs=("entropy",),
                return_stats=True,
                beta=config.beta,
                **clip,
            )
        (loss + balance).backward()
        batch = packed.batch if packed.batch.old_logp is not None else replace(packed.batch, old_logp=stats.logp)
        scored.append(replace(packed, batch=batch))
        total = total + loss.detach()
        shown = metrics.policy(stats, batch, importance_sampling_level=config.importance_sampling_level, **clip)
        seen = metrics.joined(seen, shown, of_router)
    if packs:
        skipped = tokens - sum(len(packed.batch.kept) for packed in packs)
        seen = metrics.joined(seen, metrics.unclipped(skipped, the_device()))
    return scored, {"loss": float(total)} | metrics.floats(seen)
