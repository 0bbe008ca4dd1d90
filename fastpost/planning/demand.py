"""From a verb and its fields to what they ask of memory: the shape of a microbatch, the roles, the rollouts.

Sequences are taken to be as long as they may be, and all alike.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from fastpost.planning.config import Planned, PlannedGrpo, PlannedPairs, PlannedPpo, PlannedReward, PlannedSft


@dataclass(frozen=True)
class Rollout:
    """Completions that are decoded together."""

    together: int  # at most
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
    step_rows: int  # sequences of an optimizer step
    length: int  # tokens of each
    scored: int  # of them, those that the head sees: a completion's
    each: int = 1  # sequences that the loss must see together: 2 are a pair
    roles: Roles = Roles()
    scalar: bool = False  # whether the policy's head is scalar
    rollout: Rollout | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def prompt(self) -> int:
        return self.length - self.scored

    @property
    def unit(self) -> int:
        """Tokens that the loss must see together."""
        return self.each * self.length if self.each > 1 else 1

    @property
    def accumulates(self) -> bool:
        """Whether a step has several microbatches."""
        return self.rows < self.step_rows

    @property
    def completions(self) -> int:
        return min(self.rollout.together, self.step_rows) if self.rollout is not None else 0

    def of_rows(self, rows: int) -> Demand:
        """As many microbatches of so many sequences each."""
        return replace(self, rows=rows, step_rows=rows * -(-self.step_rows // self.rows))

    def of_length(self, length: int) -> Demand:
        """Of sequences of so many tokens, a prompt and a completion in the same proportion; a microbatch is one of
        them, or a pair. As many are sampled."""
        scored = -(-length * self.scored // self.length)
        step_rows = self.step_rows if self.rollout is not None else self.of_rows(self.each).step_rows
        return replace(self, rows=self.each, step_rows=step_rows, length=length, scored=scored)


@functools.singledispatch
def demand_of(config: Planned) -> Demand:
    """Of a run with these fields."""
    raise AssertionError(type(config))


@demand_of.register
def _(config: PlannedSft) -> Demand:
    length = config.max_length
    return Demand(*_rows(config, length), length, scored=length)


@demand_of.register
def _(config: PlannedPairs) -> Demand:
    length, judged = config.max_length, isinstance(config, PlannedReward)
    roles = Roles() if judged else Roles(reference=True, passes=True)
    return Demand(*_rows(config, length, each=2), length, scored=length, each=2, roles=roles, scalar=judged)


@demand_of.register
def _(config: PlannedGrpo) -> Demand:
    return _sampled(config, Roles(reference=config.beta > 0, passes=config.beta > 0))


@demand_of.register
def _(config: PlannedPpo) -> Demand:
    apart = config.roles == "separate" or not config.trains_adapter
    on_base = 2 if apart else 3  # apart, the reward is merged into its own model
    return _sampled(config, Roles(2, on_base, config.beta > 0, 2 if apart else 0, passes=True))


def _sampled(config: PlannedGrpo | PlannedPpo, roles: Roles) -> Demand:
    scored, rollout = config.max_completion_length, Rollout(config.generation_batch_size, config.rollout_engine)
    length = config.max_prompt_length + scored
    return Demand(*_rows(config, length), length, scored, roles=roles, rollout=rollout)


def _rows(config: Planned, length: int, each: int = 1) -> tuple[int, int]:
    """Sequences of a microbatch, and of a step."""
    step_rows, rows = config.rows_per_step * each, config.per_device_train_batch_size * each
    if config.max_tokens_per_batch is not None:
        units = max(1, config.max_tokens_per_batch // (length * each))
        rows = min(step_rows, units * each)
    return rows, step_rows
