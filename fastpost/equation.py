"""How a loss is declared: an equation on kept tokens, and what the head must know to schedule it.

    @loss(unit="pair")
    def dpo(stats: Stats, batch: Batch, *, beta: Positive = 0.1) -> Tensor:

The equation sees kept tokens only, laid end to end: `batch.lengths` counts the kept tokens of each sequence, and a
reading of anything that was not given is an error naming it. It returns one number a unit.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor

from fastpost.knobs import resolve
from fastpost.types import IGNORE, OUTPUTS, Batch, Stats, Unit, check_tensor, nearest

# What a loss of tokens may not ask of a batch: it may be shown any part of a sequence.
WHOLE_SEQUENCES = frozenset({"lengths", "counts", "per_sequence", "mean_per_sequence", "pairs"})


class _Given:
    """What an equation sees of Stats or Batch. Reading what was not given, or is not its to see, is an error."""

    def __init__(self, of: Stats | Batch, loss: Loss | ScalarLoss):
        self._of, self._loss = of, loss

    def __getattr__(self, name: str):
        what, value = f"{type(self._of).__name__.lower()}.{name}", getattr(self._of, name)
        if value is None:
            raise ValueError(f"the loss {self._loss.name!r} needs {what}, which is None")
        if self._loss.unit == "token" and name in WHOLE_SEQUENCES:
            raise ValueError(
                f"the loss {self._loss.name!r} is one of tokens and asks for {what}: declare unit='sequence'"
            )
        return value


Condition = Callable[[Mapping[str, Any]], object]
Idle = Callable[[Batch, Mapping[str, Any]], Tensor | None]  # (T,) bool; None: nowhere


@dataclass(frozen=True, eq=False)  # the same loss is the same object, so it can be a key
class Loss:
    """An equation on statistics, called like it: (stats, batch, *, knobs) -> (U,). Made by the decorator `loss`."""

    equation: Callable[..., Tensor]
    unit: Unit
    reads: tuple[str, ...]  # statistics, as `token_stats` names its outputs
    differentiates: tuple[str, ...]  # those of them that carry a gradient; the rest arrive detached
    also: Mapping[str, Condition] = field(default_factory=dict)  # a statistic -> the knobs with which it is read, too
    only_looks: frozenset[str] = frozenset()  # those that carry none, of `also` too
    idle: Idle | None = None  # tokens whose coefficient is zero, whatever the statistics
    knobs: Mapping[str, Any] | None = None  # all of them, once bound

    @property
    def name(self) -> str:
        return self.equation.__name__

    @property
    def __signature__(self) -> inspect.Signature:  # and its knobs, with their defaults
        return inspect.signature(self.equation)

    @property
    def __doc__(self) -> str | None:  # so that help(fp.losses.dpo) shows the formula
        return self.equation.__doc__

    def bind(self, **given: object) -> Loss:
        """The loss with its knobs set, which reads what these knobs make it read. ValueError for one out of place."""
        knobs = resolve(self.equation, {**(self.knobs or {}), **given})
        more = tuple(name for name, on in self.also.items() if name not in self.reads and on(knobs))
        carrying = tuple(name for name in more if name not in self.only_looks)
        return replace(self, knobs=knobs, reads=self.reads + more, differentiates=self.differentiates + carrying)

    def live(self, batch: Batch, kept: Tensor) -> Tensor | None:  # (T,) bool -> (T,) bool
        """The kept tokens of units that can add to a sum of weight * loss; None where none is known that cannot.

        A unit cannot if its weight is 0 or all its kept tokens are idle.
        """
        assert self.knobs is not None
        idle = None if self.idle is None else self.idle(_Given(batch, self), self.knobs)  # type: ignore[arg-type]
        if idle is None and batch.weight is None:
            return None
        live, weighed = kept if idle is None else kept & ~idle, True
        if batch.weight is not None:
            weighed = batch.weight.to(kept.device) != 0
        if self.unit == "token":
            return live & weighed
        U = batch.units(self.unit)
        alive = batch.per_sequence(live.int()).view(U, -1).any(1) & weighed
        return kept & batch.spread(alive.repeat_interleave(batch.lengths.numel() // U))

    def on_kept(self, stats: Stats, batch: Batch) -> Tensor:  # batch.at(kept) -> (U,)
        """The equation itself, bound, for a batch from which the ignored tokens are gone already."""
        assert self.knobs is not None
        value = self.equation(_Given(stats, self), _Given(batch, self), **self.knobs)
        return _one_a_unit(self, value, batch.units(self.unit))

    def __call__(self, stats: Stats, batch: Batch, **knobs: object) -> Tensor:  # (T,) fields -> (U,)
        """One number per unit; 0, with no gradient, for a unit whose tokens are all ignored."""
        bound, T, U = self.bind(**knobs), batch.target.numel(), batch.units(self.unit)
        given = {f.name: getattr(stats, f.name) for f in fields(stats) if getattr(stats, f.name) is not None}
        for name, value in given.items():
            if value.shape != (T,):
                raise ValueError(f"stats.{name} must have shape ({T},) to match batch.target, got {tuple(value.shape)}")
        carrying = {OUTPUTS[name] for name in bound.differentiates}
        given = {name: value if name in carrying else value.detach() for name, value in given.items()}
        rows = _kept(batch)
        inner = batch.at(rows)
        kept = Stats(**{name: value.index_select(0, rows) for name, value in given.items()})
        return _over_units(bound.on_kept(kept, inner), inner, self.unit, rows, U)


@dataclass(frozen=True)
class ScalarLoss:
    """An equation on what a scalar head says, called like it: (values, batch, *, knobs) -> (U,).

    values has a number for each token, (T,) or (T, C), where the unit is a token; else one for each sequence, (S,).
    """

    equation: Callable[..., Tensor]
    unit: Unit

    @property
    def name(self) -> str:
        return self.equation.__name__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.equation)

    @property
    def __doc__(self) -> str | None:
        return self.equation.__doc__

    def __call__(self, values: Tensor, batch: Batch, **knobs: object) -> Tensor:
        """One number per unit; 0, with no gradient, for a unit whose tokens are all ignored."""
        resolved, U = resolve(self.equation, knobs), batch.units(self.unit)
        first = next(iter(inspect.signature(self.equation).parameters))
        check_tensor(first, values)
        n = batch.target.numel() if self.unit == "token" else batch.lengths.numel()
        if values.shape[:1] != (n,) or values.ndim > (2 if self.unit == "token" else 1):
            each = "token" if self.unit == "token" else "sequence"
            raise ValueError(
                f"the loss {self.name!r} takes a number for each {each}: {first} must have shape ({n},), "
                f"got {tuple(values.shape)}"
            )
        rows = _kept(batch)
        inner = batch.at(rows)
        if self.unit == "token":
            values = values.index_select(0, rows)
        loss = self.equation(values, _Given(inner, self), **resolved)
        return _over_units(_one_a_unit(self, loss, inner.units(self.unit)), inner, self.unit, rows, U)


def _kept(batch: Batch) -> Tensor:  # (N,)
    return batch.kept if batch.kept is not None else (batch.target != IGNORE).nonzero()[:, 0]


def _one_a_unit(loss: Loss | ScalarLoss, value: Any, U: int) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (U,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss {loss.name!r} must return one number for each {loss.unit}, ({U},), got {got}")
    return value


def _over_units(loss: Tensor, inner: Batch, unit: Unit, rows: Tensor, U: int) -> Tensor:
    """From kept units to all, with zeros in the place of the others."""
    if unit == "token":
        return loss.new_zeros(U).index_copy(0, rows, loss)
    return torch.where(inner.kept_units(unit), loss, 0.0)


def loss(
    *,
    unit: Unit,
    reads: Sequence[str] = ("logp",),
    also: Mapping[str, Condition] | None = None,
    differentiates: Sequence[str] | None = None,
    idle: Idle | None = None,
) -> Callable[[Callable[..., Tensor]], Loss]:
    """Declares a loss: `@loss(unit="pair")` above `def dpo(stats, batch, *, beta=0.1)`.

    unit: the smallest group of tokens that must be seen together. reads: the statistics it looks at. also: further
    ones, each with a condition on the knobs, {"entropy": lambda knobs: knobs["entropy_coef"]}.
    differentiates: those through which its gradient flows (all, unless named); fewer are cheaper.
    idle: of (batch, knobs), which tokens (T,) have the coefficient zero. A unit of no others, whose loss and gradient
    must then be 0 whatever its statistics, never reaches the head.
    """
    also = also or {}
    named = (*reads, *also)
    for name in (*named, *(differentiates or ())):
        if name not in OUTPUTS:
            raise ValueError(f"unknown statistic {name!r}{nearest(name, list(OUTPUTS))}; known: {', '.join(OUTPUTS)}")
    if unit not in get_args(Unit):
        raise ValueError(f"unit must be 'token', 'sequence', 'pair' or 'batch', got {unit!r}")
    if differentiates is None:
        differentiates = [name for name in named if name != "top1"]
    elif "top1" in differentiates or not set(differentiates) <= set(named):
        raise ValueError(f"differentiates must be some of {named} other than top1, got {tuple(differentiates)}")
    carrying = tuple(name for name in reads if name in differentiates)
    looks = frozenset(named) - set(differentiates)
    return lambda equation: Loss(equation, unit, tuple(reads), carrying, also, looks, idle)


def scalar_loss(*, unit: Unit) -> Callable[[Callable[..., Tensor]], ScalarLoss]:
    """Declares a loss of a scalar head: `@scalar_loss(unit="token")` above `def value(values, batch, *, ...)`."""
    return functools.partial(_scalar, unit)


def _scalar(unit: Unit, equation: Callable[..., Tensor]) -> ScalarLoss:
    return ScalarLoss(equation, unit)
