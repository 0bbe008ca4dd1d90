"""Knobs of a loss: keyword arguments whose annotation says what they may be, so that no equation has to check one.

    def dpo(stats, batch, *, beta: Positive = 0.1, label_smoothing: BelowHalf = 0.0)

`resolve` is the only reader: it names the loss, the knob, what was got, and what would be right.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from fastpost.types import nearest


@dataclass(frozen=True)
class Domain:
    """What a knob may be, in words and as a test."""

    says: str
    holds: Callable[[Any], bool]


def _number(says: str, holds: Callable[[float], bool]) -> Domain:
    """A finite number with a property; True and False are none."""
    return Domain(
        says,
        lambda x: isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and holds(x),
    )


Number = Annotated[float, _number("a finite number", lambda x: True)]
Positive = Annotated[float, _number("a positive number", lambda x: x > 0)]
NonNegative = Annotated[float, _number("a number not below 0", lambda x: x >= 0)]
Fraction = Annotated[float, _number("a number in [0, 1]", lambda x: 0 <= x <= 1)]
BelowHalf = Annotated[float, _number("a number in [0, 0.5)", lambda x: 0 <= x < 0.5)]
InsideHalf = Annotated[float, _number("a number in (0, 0.5)", lambda x: 0 < x < 0.5)]
AboveOne = Annotated[float, _number("a number above 1", lambda x: x > 1)]
Switch = Annotated[bool, Domain("True or False", lambda x: isinstance(x, bool))]


def domain(annotation: Any) -> Domain | None:
    """Of Annotated[..., Domain], Literal[...], and either of them `| None`; nothing is known of another annotation."""
    if get_origin(annotation) is Annotated:
        return next((each for each in annotation.__metadata__ if isinstance(each, Domain)), None)
    if get_origin(annotation) is Literal:
        options = get_args(annotation)
        return Domain(f"one of {', '.join(map(repr, options))}", lambda x: isinstance(x, str) and x in options)
    if get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation):
        (inner,) = (each for each in get_args(annotation) if each is not type(None))
        found = domain(inner)
        return found and Domain(f"{found.says}, or None", lambda x: x is None or found.holds(x))
    return None


def knobs_of(function: Callable) -> dict[str, inspect.Parameter]:
    """Its keyword-only arguments."""
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def resolve(function: Callable, given: Mapping[str, object]) -> dict[str, Any]:
    """Every knob of the function by name: what was given, checked, and the default of the rest."""
    known, name = knobs_of(function), function.__name__
    for knob, value in given.items():
        if knob not in known:
            raise ValueError(
                f"the loss {name!r} has no knob {knob!r}{nearest(knob, list(known))}; "
                f"its knobs: {', '.join(known) or 'none'}"
            )
        allowed = domain(known[knob].annotation)
        if allowed and not allowed.holds(value):
            raise ValueError(f"the loss {name!r}: {knob} must be {allowed.says}, got {value!r}")
    return {knob: given.get(knob, p.default) for knob, p in known.items()}


def picked(function: Callable, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the knobs that are the function's."""
    return {name: knobs[name] for name in knobs_of(function)}


def shared_signature(equation: Callable, *others: Callable) -> inspect.Signature:
    """(stats, batch, *, the knobs of all of them): of a loss whose family has knobs beside its own."""
    positional = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("stats", "batch")]
    knobs = knobs_of(equation)
    for other in others:
        knobs |= {name: p for name, p in knobs_of(other).items() if name not in knobs}
    return inspect.Signature([*positional, *knobs.values()])
