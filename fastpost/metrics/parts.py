"""What a metric is before it is a number: what adds up over microbatches and processes, and how it ends.

Sums are float64: they do not depend on the cut, and differences of them (a variance) keep their digits. All means are
over the places where the mask is true, whatever the values elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Numbers that are joined entry by entry, and the metric that they give in the end."""

    numbers: Tensor  # (k,) float64
    join: Literal["sum", "min", "max"]
    finish: Callable[[Tensor], Tensor]  # (k,) -> ()


# ---- the kinds of metric ----


def mean(x: Tensor, mask: Tensor | None = None) -> Part:
    """Over the mask."""
    return Part(_sums(mask, x), "sum", _mean)


def total(x: Tensor, mask: Tensor | None = None) -> Part:
    return Part(_sums(mask, x), "sum", lambda s: s[1])


def smallest(x: Tensor, mask: Tensor | None = None) -> Part:
    return Part(_extreme(x, mask, torch.inf).amin().reshape(1), "min", _finite)


def largest(x: Tensor, mask: Tensor | None = None) -> Part:
    return Part(_extreme(x, mask, -torch.inf).amax().reshape(1), "max", _finite)


def mean_difference(x: Tensor, first: Tensor, second: Tensor) -> Part:
    """The mean where `first` less the mean where `second`."""
    return Part(torch.cat([_sums(first, x), _sums(second, x)]), "sum", lambda s: _mean(s[:2]) - _mean(s[2:]))


def variance(x: Tensor, mask: Tensor | None = None) -> Part:
    """Over n - 1."""
    return Part(_sums(mask, x, x.double().square()), "sum", lambda s: _spread(s[0], s[1], s[1], s[2]) / (s[0] - 1))


def covariance(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Part:
    """Over n."""
    return Part(_sums(mask, x, y, x.double() * y), "sum", lambda s: _spread(s[0], s[1], s[2], s[3]) / s[0])


def correlation(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Part:
    """Pearson's; NaN where one of them does not vary."""
    x, y = x.double(), y.double()
    return Part(_sums(mask, x, y, x * x, y * y, x * y), "sum", _correlation)


def explained(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Part:
    """1 - Var(x - y) / Var(x): how much of x is known from y."""
    rest = x.double() - y
    return Part(_sums(mask, x, x.double().square(), rest, rest.square()), "sum", _explained)


# ---- joining them ----


def joined(*seen: dict[str, Part]) -> dict[str, Part]:
    """The parts of several microbatches, or of several functions."""
    together: dict[str, Part] = {}
    for name, part in (item for parts in seen for item in parts.items()):
        before = together.get(name)
        together[name] = part if before is None else _both(name, before, part)
    return together


def over_ranks(seen: dict[str, Part]) -> dict[str, Part]:
    """Joined over the processes of torch.distributed, all of which must hold the same names. Three reductions."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return seen
    together = {}
    for join, operation in (("sum", "SUM"), ("min", "MIN"), ("max", "MAX")):
        names = sorted(name for name, part in seen.items() if part.join == join)
        if names:
            flat = torch.cat([seen[name].numbers for name in names])
            torch.distributed.all_reduce(flat, getattr(torch.distributed.ReduceOp, operation))
            numbers = flat.split([len(seen[name].numbers) for name in names])
            together |= {name: replace(seen[name], numbers=n) for name, n in zip(names, numbers, strict=True)}
    return {name: together[name] for name in seen}


def values(seen: dict[str, Part]) -> dict[str, Tensor]:
    """What to log: 0-dim float64 tensors, where the parts are."""
    return {name: part.finish(part.numbers) for name, part in seen.items()}


def floats(seen: dict[str, Part]) -> dict[str, float]:
    """The same on the host, in one transfer."""
    if not seen:
        return {}
    return dict(zip(seen, torch.stack(list(values(seen).values())).tolist(), strict=True))


def _both(name: str, one: Part, other: Part) -> Part:
    if one.join != other.join or one.numbers.shape != other.numbers.shape:
        raise ValueError(f"the metric {name!r} is of two kinds: {one.join} and {other.join}; give one another name")
    join = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}[one.join]
    return replace(one, numbers=join(one.numbers, other.numbers))


# ---- sums, and what they give ----


def _sums(mask: Tensor | None, *columns: Tensor) -> Tensor:  # -> (1 + columns,): how many, and the sum of each
    mask = torch.ones_like(columns[0], dtype=torch.bool) if mask is None else mask
    given = [torch.where(mask, x.detach(), 0).sum(dtype=torch.float64) for x in columns]
    return torch.stack([mask.sum(dtype=torch.float64), *given])


def _extreme(x: Tensor, mask: Tensor | None, otherwise: float) -> Tensor:
    """With one number more, which is never the extreme: there may be nothing."""
    x = x.detach().double()
    masked = x if mask is None else torch.where(mask, x, otherwise)
    return torch.cat([masked.flatten(), x.new_full((1,), otherwise)])


def _finite(s: Tensor) -> Tensor:
    return torch.where(s[0].isinf(), torch.nan, s[0])


def _mean(s: Tensor) -> Tensor:
    return s[1] / s[0]


def _spread(n: Tensor, x: Tensor, y: Tensor, xy: Tensor) -> Tensor:
    """sum (x - mean x) (y - mean y)."""
    return xy - x * y / n


def _correlation(s: Tensor) -> Tensor:
    n, x, y, xx, yy, xy = s.unbind()
    return _spread(n, x, y, xy) / (_spread(n, x, x, xx).clamp(min=0) * _spread(n, y, y, yy).clamp(min=0)).sqrt()


def _explained(s: Tensor) -> Tensor:
    n, x, xx, rest, squares = s.unbind()
    return 1 - _spread(n, rest, rest, squares) / _spread(n, x, x, xx)
