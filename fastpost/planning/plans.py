"""A plan: what is there all the time, and what each moment of a step puts beside it.

  rollout    the prompts are read, then completions decoded beside their cache; not where an engine of its own samples
  reference  the roles that run without a gradient
  training   forward, head and backward over a microbatch, at the greediest instant
  step       all gradients, and what the optimizer needs besides

The peak is that of the greediest moment; the parts of a moment add up.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from fastpost.planning.acted import Acted
from fastpost.planning.config import Planned
from fastpost.planning.demand import Demand, demand_of
from fastpost.planning.head import Way, way
from fastpost.planning.outline import bytes_of, outline
from fastpost.planning.source import architecture, as_stored
from fastpost.planning.states import adamw_bytes, adamw_scratch

HALF = 2  # bytes of a number in 16 bits
PARTS = (
    *("weights", "quantisation state", "adapters", "other models", "rollout engine", "optimizer"),
    *("gradients", "activations", "head", "KV cache", "scratch"),
)


@dataclass(frozen=True)
class Moment:
    name: str
    parts: Mapping[str, int]  # bytes

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, eq=False)
class Survey:
    """A model and what a run asks of it."""

    acted: Acted
    config: Planned
    demand: Demand

    def of(self, demand: Demand) -> Survey:
        """The same run with microbatches of another shape."""
        return Survey(self.acted, self.config, demand)

    @functools.cached_property
    def resting(self) -> dict[str, int]:
        """What is there all the time."""
        made, roles, rollout = self.acted.made, self.demand.roles, self.demand.rollout
        weights, state = made.stored()
        parts = {
            "weights": weights,
            "quantisation state": state,
            "adapters": made.adapters() * roles.adapters,
            "other models": self._other_models(weights + state),
            "rollout engine": HALF * made.parameters() if rollout is not None and rollout.engine else 0,
            "optimizer": sum(adamw_bytes(trained, self.config.optim) for trained in self._trained()),
        }
        return {name: size for name, size in parts.items() if size}

    @property
    def rests(self) -> int:
        """Bytes of all that."""
        return sum(self.resting.values())

    def _trained(self) -> list[list[nn.Parameter]]:
        """The parameters that have gradients: the policy's, and those of a value, which has no use for words."""
        made = self.acted.made
        return [made.trained(words=role == 0) for role in range(self.demand.roles.trained)]

    def _other_models(self, own: int) -> int:
        """A reference where the policy is no adapter; and what judges, without a head of words."""
        made, roles = self.acted.made, self.demand.roles
        copies = int(roles.reference and (roles.judges > 0 or not made.config.trains_adapter))
        if not roles.judges:
            return own * copies  # as it was before training, in its dtype
        # What does not train is stored in 16 bits, as it was published; a value trains whole where the policy does.
        frozen = own if made.config.trains_adapter or made.kind == "cpu" else HALF * made.parameters()
        value = own if not made.config.trains_adapter else frozen
        words = made.head_bytes() / own
        return round(copies * frozen + (1 - words) * (value + frozen * (roles.judges - 1)))

    @functools.cached_property
    def moments(self) -> list[Moment]:
        return [*self._rollout(), *self._reference(), *self._training()]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak_bytes(self) -> int:
        """Of the peak, without the moment that cannot be it: a pass without a gradient holds less than one with."""
        counted = self._way(trains=False).workspace > self._way(trains=True).workspace
        moments = *self._rollout(), *self._training(), *(self._reference() if counted else ())
        return max(moment.total for moment in moments)

    def _rollout(self) -> Iterator[Moment]:
        demand, acted, n = self.demand, self.acted, self.demand.completions
        if demand.rollout is None or demand.rollout.engine:
            return
        asked, said = acted.prompts(n, demand.prompt), acted.decoding(n, demand.length)
        for name, timeline, length in (("prompts", asked, demand.prompt), ("completions", said, demand.length)):
            cache, live = acted.cached(n, length), timeline.greediest().live
            yield self._moment(f"rollout: {name}", {"KV cache": cache, "activations": max(0, live - cache)})

    def _reference(self) -> Iterator[Moment]:
        demand = self.demand
        if demand.roles.passes:
            instant = self.acted.forward(demand.rows, demand.length).greediest(self._way(trains=False).workspace)
            yield self._moment("reference", {"activations": instant.live, "head": instant.head})

    def _training(self) -> Iterator[Moment]:
        demand, acted = self.demand, self.acted
        policy, *others = (bytes_of(trained) for trained in self._trained())
        head = self._way(trains=True)
        timeline = acted.training(demand.rows, demand.length, head.schedule, scalar=demand.scalar)
        if demand.accumulates:
            timeline = timeline.after_another(policy)
        instant = timeline.greediest(head.workspace)
        parts = {"activations": instant.live - instant.gradients, "head": instant.head}
        yield self._moment("training", {"gradients": instant.gradients + sum(others), **parts})
        scratch = adamw_scratch(acted.made.trained(), self.config.optim, acted.made.kind)
        yield self._moment("step", {"gradients": policy + sum(others), "scratch": scratch})

    def _moment(self, name: str, parts: Mapping[str, int]) -> Moment:
        return Moment(name, {name: size for name, size in (self.resting | dict(parts)).items() if size})

    def _way(self, *, trains: bool) -> Way:
        demand = self.demand
        if demand.scalar:
            return Way("frozen", 0)
        return way(self.acted.made, demand.rows * demand.scored, demand.unit, trains=trains)


def surveyed(config: Planned) -> Survey:
    """The model and the run of a config."""
    found = architecture(config)
    config = as_stored(config, found)
    demand = demand_of(config)
    made = outline(config, config.device, found, scalar=demand.scalar)
    known = made.positions
    if known is not None and demand.length > known:
        raise ValueError(
            f"sequences of {demand.length} tokens (max_length, or max_prompt_length and max_completion_length "
            f"together) do not fit into the {known} positions of {type(made.lm).__name__} (max_position_embeddings)"
        )
    return Survey(Acted(made), config, demand)


def without_kept_casts(one: Survey) -> Survey:
    """Where autocast's copies of weights go with their layer."""
    return replace(one, acted=Acted(replace(one.acted.made, keeps_casts=False)))
