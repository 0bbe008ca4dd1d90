"""From a verb and its fields to what they ask of memory: the shape of a microbatch, the roles, the rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastpost.planning.config import Planned, PlannedDpo, PlannedGrpo, PlannedPairs, PlannedPpo, PlannedReward


@dataclass(frozen=True)
class Rollout:
    """Completions that are decoded together."""

    completions: int
    prompt: int  # tokens
    completion: int
    engine: bool  # whether another program samples, from weights of its own


@dataclass(frozen=True)
class Roles:
    """Beside the policy."""

    trained: int = 1  # the policy, and a value
    adapters: int = 1  # on the base, of those: the policy's, the value's, the reward's
    reference: bool = False  # whether there is one
    judges: int = 0  # models of their own with a scalar head: the value, the reward
    passes: bool = False  # whether any role runs without a gradient


@dataclass(frozen=True)
class Demand:
    """What a run asks of memory, whatever it trains."""

    rows: int  # sequences of a microbatch
    length: int  # tokens of each
    unit: int  # tokens that the loss must see together
    accumulates: bool  # whether a step has several microbatches
    roles: Roles
    scored: float = 1.0  # of the tokens, the share that the head sees
    scalar: bool = False  # whether the policy's head is scalar
    rollout: Rollout | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def demand_of(config: Planned) -> Demand:
    """Of a run with these fields. Sequences are as long as they may be, and all alike."""
    fields: Any = config
    paired = isinstance(config, PlannedPairs)
    sampled = isinstance(config, PlannedGrpo | PlannedPpo)
    length = fields.max_prompt_length + fields.max_completion_length if sampled else fields.max_length or 1024
    rows = config.per_device_train_batch_size * (2 if paired else 1)
    if config.max_tokens_per_batch is not None:
        rows = max(2 if paired else 1, config.max_tokens_per_batch // length)
    return Demand(
        rows,
        length,
        unit=2 * length if paired else 1,
        accumulates=config.gradient_accumulation_steps > 1,
        roles=_roles(config),
        scored=fields.max_completion_length / length if sampled else 1.0,
        scalar=isinstance(config, PlannedReward),
        rollout=_rollout(fields) if sampled else None,
    )


def _roles(config: Planned) -> Roles:
    if isinstance(config, PlannedPpo):
        apart = config.roles == "separate" or not config.trains_adapter
        on_base = 2 if apart else 3  # apart, the reward is merged into its own model
        return Roles(2, on_base, bool(config.beta), 2 if apart else 0, passes=True)
    reference = isinstance(config, PlannedDpo) or (isinstance(config, PlannedGrpo) and config.beta > 0)
    return Roles(reference=reference, passes=reference)


def _rollout(fields: Any) -> Rollout:
    return Rollout(
        min(fields.generation_batch_size, fields.rows_per_step),
        fields.max_prompt_length,
        fields.max_completion_length,
        fields.rollout_engine,
    )
