"""A plan: what is there all the time, and what each moment of a step puts beside it.

  rollout    the prompts are read, then completions decoded beside their cache
  reference  the roles that run without a gradient
  training   forward, head and backward over a microbatch, at the greediest instant
  step       all gradients, and what the optimizer needs besides

The peak is that of the greediest moment, and the parts are those of that moment, so they add up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fastpost.planning.demand import Demand
from fastpost.planning.head import way
from fastpost.planning.outline import Outline
from fastpost.planning.passes import cached_bytes, forward_pass, training_pass
from fastpost.planning.states import adamw_bytes, adamw_scratch
from fastpost.planning.timeline import Growth, Timeline

HALF = 2  # bytes of a number in 16 bits
STEP = 64  # tokens to which the largest microbatch is rounded down
MOST = 1 << 18  # steps; more is not looked for
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
    """A model and a run, and how what they hold grows with the tokens of a microbatch."""

    made: Outline
    demand: Demand
    training: Growth
    forward: Growth | None  # None: no role runs without a gradient, and nothing is sampled
    cached: int | None  # bytes of a token in the cache of a rollout

    @functools.cached_property
    def trained_bytes(self) -> int:
        return sum(p.numel() * p.itemsize for p in self.made.trained())

    @functools.cached_property
    def resting(self) -> dict[str, int]:
        """What is there all the time."""
        made, roles, rollout = self.made, self.demand.roles, self.demand.rollout
        weights, state = made.stored()
        parts = {
            "weights": weights,
            "quantisation state": state,
            "adapters": made.adapters() * roles.adapters,
            "other models": self._other_models(weights + state),
            "rollout engine": HALF * made.parameters() if rollout is not None and rollout.engine else 0,
            "optimizer": adamw_bytes(made.trained(), made.config.optim) * roles.trained,
        }
        return {name: size for name, size in parts.items() if size}

    def _other_models(self, own: int) -> int:
        """A reference where the policy is no adapter; and what judges, without a head of words."""
        made, roles = self.made, self.demand.roles
        copies = int(roles.reference and (roles.judges > 0 or not made.config.trains_adapter))
        if not roles.judges:
            return own * copies  # as it was before training, in its dtype
        # What does not train is stored in 16 bits, as it was published; a value trains whole where the policy does.
        frozen = own if made.config.trains_adapter or made.kind == "cpu" else HALF * made.parameters()
        value = own if not made.config.trains_adapter else frozen
        words = made.head_bytes() / own
        return round(copies * frozen + (1 - words) * (value + frozen * (roles.judges - 1)))

    def moments(self, tokens: int) -> Iterator[Moment]:
        """Those of a step whose microbatches have so many tokens."""
        roles, all_gradients = self.demand.roles, self.trained_bytes * self.demand.roles.trained
        yield from self._rollout()
        if roles.passes and self.forward is not None:
            instant = self.forward.most(tokens, self._workspace(tokens, trains=False))
            yield self._moment("reference", {"activations": instant.live, "head": instant.head})
        instant = self.training.most(tokens, self._workspace(tokens, trains=True))
        gradients = instant.gradients + all_gradients - self.trained_bytes
        activations = instant.live - instant.gradients
        yield self._moment("training", {"gradients": gradients, "activations": activations, "head": instant.head})
        scratch = adamw_scratch(self.made.trained(), self.made.config.optim, self.made.kind)
        yield self._moment("step", {"gradients": all_gradients, "scratch": scratch})

    def _rollout(self) -> Iterator[Moment]:
        rollout = self.demand.rollout
        if rollout is None or self.forward is None or self.cached is None:
            return
        asked, n = rollout.completions * rollout.prompt, rollout.completions
        cache = {"KV cache": self.cached * asked}
        yield self._moment("rollout: prompts", cache | {"activations": self.forward.most(asked).live})
        logits = 2 * 4 * n * self.made.vocabulary  # fp32, and their probabilities
        cache = {"KV cache": self.cached * n * (rollout.prompt + rollout.completion)}
        yield self._moment("rollout: completions", cache | {"activations": logits})

    def _moment(self, name: str, parts: Mapping[str, int]) -> Moment:
        return Moment(name, {name: size for name, size in (self.resting | dict(parts)).items() if size})

    def _workspace(self, tokens: int, *, trains: bool) -> int:
        rows = math.ceil(tokens * self.demand.scored)
        return 0 if self.demand.scalar else way(self.made, rows, self.demand.unit, trains=trains).workspace

    def peak(self, tokens: int) -> Moment:
        return max(self.moments(tokens), key=lambda moment: moment.total)

    def largest(self, capacity: int) -> int:
        """The most tokens of a microbatch that fit in so many bytes; 0: none do."""
        fits: Callable[[int], bool] = lambda steps: self.peak(steps * STEP).total <= capacity  # noqa: E731
        if not fits(1):
            return 0
        low, high = 1, 2
        while fits(high) and high < MOST:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * STEP


def survey(made: Outline, demand: Demand) -> Survey:
    """Of a model in a run, whose passes are acted out when they are asked for."""
    scalar, accumulates = demand.scalar, demand.accumulates
    schedule = (
        "frozen" if scalar else way(made, math.ceil(demand.tokens * demand.scored), demand.unit, trains=True).schedule
    )

    def training(times: int) -> Timeline:
        rows = times * demand.rows
        return training_pass(made, rows, demand.length, schedule=schedule, accumulates=accumulates, scalar=scalar)

    forward = cached = None
    if demand.roles.passes or demand.rollout is not None:
        forward = Growth(demand.tokens, lambda times: forward_pass(made, times * demand.rows, demand.length))
    if demand.rollout is not None:
        cached = cached_bytes(made)
    return Survey(made, demand, Growth(demand.tokens, training), forward, cached)
