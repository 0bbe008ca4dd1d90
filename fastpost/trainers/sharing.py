"""Completions of one prompt in one pack, which has it once: P + R_1 + ... + R_G tokens go through the trunk.

A group that a microbatch cannot hold is cut into as few parts as the packer finds, and each part has the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from fastpost.models.longrope import windows
from fastpost.models.probe import check_sharing
from fastpost.models.trunk import causal_lm, takes_shared_prompts
from fastpost.packing import plan
from fastpost.trainers.config import Clipped, Sampled
from fastpost.trainers.log import say
from fastpost.trainers.loop import the_device
from fastpost.trainers.rollouts import Rollouts

Part = list[int]  # completions of one group


def shares_prompts(model: Any, config: Clipped) -> bool:
    """Whether a run shares prompts. On a GPU only where it is asked for: there it is another kernel, not yet run. So
    with LongRoPE, which turns a long completion, and the prompt before it, otherwise than a short one."""
    can = takes_shared_prompts(model)
    if config.share_prompts and not can:
        raise ValueError(
            f"share_prompts needs packed attention, and {type(causal_lm(model)).__name__} has "
            f"{causal_lm(model).config._attn_implementation!r}: leave out share_prompts, or attn_implementation"
        )
    free = can and the_device().type == "cpu" and not windows(causal_lm(model).config)
    wanted = free if config.share_prompts is None else config.share_prompts
    if wanted:
        check_sharing(model)
    return wanted


def parts_of_packs(live: Sequence[int], rollouts: Rollouts, config: Sampled) -> list[list[Part]]:
    """The live completions by packs, and there by groups. A pack is as large as `bins` would have it."""
    cap = config.max_tokens_per_batch
    room = config.per_device_train_batch_size if cap is None else cap
    parts: list[Part] = []
    sizes: list[int] = []
    groups = [list(rows) for _, rows in groupby(live, key=lambda i: i // config.num_generations)]
    for rows in groups:
        prompt = 0 if cap is None else len(rollouts.prompts[rows[0]].input_ids)
        each = [1 if cap is None else len(rollouts.completions[i].ids) for i in rows]
        for part in plan(each, room - prompt):
            parts.append([rows[k] for k in part])
            sizes.append(prompt + sum(each[k] for k in part))
    if cap is not None and len(parts) > len(groups):
        say(
            f"{len(parts) - len(groups)} prompts are read once more: with all {config.num_generations} completions "
            f"they are more than max_tokens_per_batch {cap}"
        )
    return [[parts[i] for i in pack] for pack in plan(sizes, room)]
