"""What to change where a run does not fit: each field by itself, by what it saves of the peak."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastpost.planning.config import Planned, PlannedGrpo, PlannedPpo
from fastpost.planning.demand import demand_of
from fastpost.planning.fit import RANK
from fastpost.planning.plans import Survey, surveyed

# Fields of which the passes of a model know nothing: they are not acted out again.
OUTSIDE = {"optim", "max_tokens_per_batch", "generation_batch_size", "beta", "rollout_engine", "roles"}


@dataclass(frozen=True)
class Change:
    fields: Mapping[str, Any]
    saves: int  # bytes of the peak

    @property
    def flags(self) -> str:
        return " ".join(f"--{name} {str(value).lower()}" for name, value in self.fields.items())


def changes(before: Survey, others: Mapping[str, Survey]) -> list[Change]:
    """What would lower the peak of a run, the greatest saving first. Others that are surveyed already may be meant."""
    known = {other.config: other for other in others.values()}
    found = []
    for fields in candidates(before.config):
        after = _surveyed(replace(before.config, **fields), fields, before, known)
        if after is not None:
            found.append(Change(fields, before.peak.total - after.peak.total))
    return sorted((change for change in found if change.saves > 0), key=lambda change: -change.saves)


def _surveyed(
    config: Planned, fields: Mapping[str, Any], before: Survey, known: Mapping[Planned, Survey]
) -> Survey | None:
    """None where the model cannot be had like this: one without an MLP to tile, say."""
    if OUTSIDE.issuperset(fields):
        return Survey(before.acted, config, demand_of(config))
    try:
        return known.get(config) or surveyed(config)
    except ValueError:
        return None


def candidates(config: Planned) -> Iterator[dict[str, Any]]:
    """Fields that this run could have otherwise."""
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
    if demand.rows > demand.each:
        yield {"max_tokens_per_batch": demand.each * demand.length}
    if isinstance(config, PlannedGrpo | PlannedPpo):
        yield from _of_sampling(config)


def _of_sampling(config: PlannedGrpo | PlannedPpo) -> Iterator[dict[str, Any]]:
    completions = demand_of(config).completions
    if config.rollout_engine:
        yield {"rollout_engine": False}
    elif completions > 1:
        yield {"generation_batch_size": completions // 2}
    if config.beta:
        yield {"beta": 0.0}
    if isinstance(config, PlannedPpo) and config.roles == "separate" and config.trains_adapter:
        yield {"roles": "one base"}
