"""What fits on a GPU, under each method, and what to change where a run does not.

A GPU of N GB is counted as N 10^9 bytes. It has some 7 % more; that is left to the CUDA context, to the allocator's
gaps, and to what kernels need for themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fastpost.models.adapters import is_adapter
from fastpost.planning.config import Planned
from fastpost.planning.demand import demand_of
from fastpost.planning.outline import outline
from fastpost.planning.plans import Survey, survey

GPUS = (24, 40, 80, 141, 180)
RANK = 16  # of adapters that are planned for where the run has none
SHARED = {"weights", "quantisation state", "adapters", "other models", "optimizer", "gradients"}


def method_of(config: Planned) -> str:
    if not config.trains_adapter:
        return "full"
    return "QLoRA" if config.load_in_4bit else "LoRA"


def by_method(config: Planned) -> dict[str, Planned]:
    """The same run in each way to train; an adapter that there is already is not trained whole."""
    has_adapter = is_adapter(config.model)
    rank = 0 if has_adapter else config.lora_r or RANK
    found = {
        "full": replace(config, lora_r=0, load_in_4bit=False),
        "LoRA": replace(config, lora_r=rank, load_in_4bit=False),
        "QLoRA": replace(config, lora_r=rank, load_in_4bit=True),
    }
    return {name: run for name, run in found.items() if not (has_adapter and name == "full")}


def surveyed(config: Planned) -> Survey:
    """The model and the run of a config."""
    demand = demand_of(config)
    return survey(outline(config, config.device, scalar=demand.scalar), demand)


def gpus_needed(one: Survey, capacity: int) -> int | None:
    """How many of so many bytes, where what has parameters' sizes is cut evenly among them (FSDP, which casts a layer
    at a time) and each has a microbatch and rollouts of its own; None where one microbatch is too much."""
    tokens = one.demand.tokens
    if one.peak(tokens).total <= capacity:
        return 1
    most = 2
    for moment in survey(replace(one.made, keeps_casts=False), one.demand).moments(tokens):
        own = sum(size for name, size in moment.parts.items() if name not in SHARED)
        if own >= capacity:
            return None
        most = max(most, math.ceil((moment.total - own) / (capacity - own)))
    return most


@dataclass(frozen=True)
class Change:
    what: str  # flags, as they are typed
    saves: int  # bytes of the peak


def changes(config: Planned, before: Survey) -> list[Change]:
    """What would lower the peak, the greatest saving first; each by itself."""
    peak = before.peak(before.demand.tokens).total
    found = []
    for changed in candidates(config):
        flags = " ".join(f"--{name} {str(value).lower()}" for name, value in changed.items())
        after = surveyed(replace(config, **changed))
        found.append(Change(flags, peak - after.peak(after.demand.tokens).total))
    return sorted((change for change in found if change.saves > 0), key=lambda change: -change.saves)


def candidates(config: Planned) -> Iterator[dict[str, Any]]:
    """Fields that this run could have otherwise."""
    fields: Any = config
    demand = demand_of(config)
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    elif not config.activation_offloading and config.device == "cuda":
        yield {"activation_offloading": True}
    if not config.trains_adapter:
        yield {"lora_r": RANK}
    if not config.load_in_4bit:
        yield {"load_in_4bit": True} | ({} if config.trains_adapter else {"lora_r": RANK})
    if config.optim == "adamw_torch":
        yield {"optim": "adamw_8bit"}
    if not config.tiled_mlp and demand.length > 1:
        yield {"tiled_mlp": max(1, min(1024, demand.length // 4))}
    least = max(demand.unit, demand.length)
    if demand.tokens > least:
        yield {"max_tokens_per_batch": least}
    if demand.rollout is not None and demand.rollout.completions > 1:
        yield {"generation_batch_size": demand.rollout.completions // 2}
    if demand.roles.reference and hasattr(config, "beta"):
        yield {"beta": 0.0}
    if getattr(fields, "rollout_engine", False):
        yield {"rollout_engine": False}
    if getattr(fields, "roles", None) == "separate" and config.trains_adapter:
        yield {"roles": "one base"}
