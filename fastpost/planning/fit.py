"""What fits on a GPU, under each method.

A GPU of N GB is counted as N 10^9 bytes. It has some 7 % more; that is left to the CUDA context, to the allocator's
gaps, and to what kernels need for themselves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

from fastpost.models.adapters import is_adapter
from fastpost.planning.acted import FAR, LEAST
from fastpost.planning.config import Planned
from fastpost.planning.plans import Survey, without_kept_casts

GPUS = (24, 40, 80, 141, 180)
RANK = 16  # of adapters that are planned for where the run has none
SHARED = {"weights", "quantisation state", "adapters", "other models", "optimizer", "gradients"}


def method_of(config: Planned) -> str:
    if not config.trains_adapter:
        return "full"
    return "QLoRA" if config.load_in_4bit else "LoRA"


def by_method(config: Planned, *, in_four_bits: bool = False) -> dict[str, Planned]:
    """The same run in each way to train; an adapter that there is already is not trained whole, and a checkpoint in 4
    bits is trained in one way."""
    if in_four_bits:
        return {"QLoRA": config}
    has_adapter = is_adapter(config.model)
    rank = 0 if has_adapter else config.lora_r or RANK
    found = {
        "full": replace(config, lora_r=0, load_in_4bit=False),
        "LoRA": replace(config, lora_r=rank, load_in_4bit=False),
        "QLoRA": replace(config, lora_r=rank, load_in_4bit=True),
    }
    return {name: run for name, run in found.items() if not (has_adapter and name == "full")}


def largest_rows(one: Survey, capacity: int) -> int:
    """The most sequences of a microbatch that fit in so many bytes; 0: not one, or not one pair."""
    each = one.demand.each
    if one.rests > capacity:
        return 0

    def peak(units: int) -> int:
        return one.of(one.demand.of_rows(units * each)).peak_bytes

    return each * largest(peak, capacity, 1, FAR // (one.demand.length * each))


def largest_context(one: Survey, capacity: int) -> int:
    """The most tokens of a sequence, one or a pair of which is a microbatch, that fit in so many bytes and into the
    model's positions. What is sampled is as long."""
    known = one.acted.made.positions
    if one.rests > capacity:
        return 0

    def peak(tokens: int) -> int:
        return one.of(one.demand.of_length(tokens)).peak_bytes

    return largest(peak, capacity, min(LEAST, known or FAR), min(FAR // one.demand.each, known or FAR))


def largest(peak: Callable[[int], int], capacity: int, least: int, most: int) -> int:
    """The n of least, ..., most with peak(n) <= capacity < peak(n + 1), of a peak that grows: by the false position,
    which is right at once on a line, and by halves. 0: not even the least; `most`: all are."""
    peak = functools.cache(peak)
    if peak(least) > capacity:
        return 0
    if peak(most) <= capacity:
        return most
    low, high, turn = least, most, 0
    while high - low > 1:
        turn += 1
        share = 0.5 if turn % 4 == 0 else (capacity - peak(low)) / (peak(high) - peak(low))
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        low, high = (middle, high) if peak(middle) <= capacity else (low, middle)
    return low


def gpus_needed(one: Survey, capacity: int) -> int | None:
    """How many of so many bytes, where what has parameters' sizes is cut evenly among them (FSDP, which casts a layer
    at a time) and each has a microbatch and rollouts of its own; None where one microbatch is too much."""
    if one.peak.total <= capacity:
        return 1
    most = 2
    for moment in without_kept_casts(one).moments:
        own = sum(size for name, size in moment.parts.items() if name not in SHARED)
        if own >= capacity:
            return None
        most = max(most, math.ceil((moment.total - own) / (capacity - own)))
    return most
