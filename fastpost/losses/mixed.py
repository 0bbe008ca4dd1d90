"""A weighted sum of losses of one unit, as one loss: the statistics of one pass serve all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpost.equation import Loss, loss
from fastpost.types import Batch, Stats


def mixed(losses: Sequence[Loss], weights: Sequence[float]) -> Loss:
    """sum_i weights_i losses_i, each bound to its knobs. Those of one unit: a number a unit is what they add up."""
    assert len(losses) == len(weights) and len({each.unit for each in losses}) == 1
    bound = [each.bind() for each in losses]

    def mixture(stats: Stats, batch: Batch) -> Tensor:  # -> (U,)
        each = [part.equation(stats, batch, **(part.knobs or {})) for part in bound]
        return torch.stack([weight * value for weight, value in zip(weights, each, strict=True)]).sum(0)

    reads, carrying = (
        tuple(dict.fromkeys(name for each in bound for name in names(each)))
        for names in (lambda each: each.reads, lambda each: each.differentiates)
    )
    return loss(unit=bound[0].unit, reads=reads, differentiates=carrying)(mixture)
