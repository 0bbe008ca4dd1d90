"""Preferences without pairs: a sequence and a label, desirable or not.

l is the sum of logp over a sequence's tokens, l_ref that of ref_logp, d = l - l_ref, s the sigmoid. The family adds the
knobs desirable_weight and undesirable_weight, of which one at 0 leaves its sequences out of the head.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastpost.equation import Loss, loss
from fastpost.knobs import NonNegative, Positive, picked, shared_signature
from fastpost.types import Batch, Stats


def _judged(
    gain: Tensor, label: Tensor, *, desirable_weight: NonNegative = 1.0, undesirable_weight: NonNegative = 1.0
) -> Tensor:  # (S,), (S,) -> (S,)
    """desirable_weight s(-gain) where the label says so, undesirable_weight s(gain) elsewhere."""
    desirable, undesirable = torch.sigmoid(-gain), torch.sigmoid(gain)
    return torch.where(label, desirable_weight * desirable, undesirable_weight * undesirable)


def _without_weight(batch: Batch, knobs: Mapping[str, Any]) -> Tensor | None:  # (T,) bool
    """Tokens of sequences whose label counts for nothing."""
    desirable, undesirable = (knobs[name] == 0 for name in ("desirable_weight", "undesirable_weight"))
    return batch.spread(torch.where(batch.label, desirable, undesirable)) if desirable or undesirable else None


def _of_labels(gain: Callable[..., Tensor]) -> Loss:
    """Declares a loss of what a sequence has gained on the reference."""

    @functools.wraps(gain)
    def of_sequences(stats: Stats, batch: Batch, **knobs) -> Tensor:
        gained = batch.per_sequence(stats.logp - batch.ref_logp)
        return _judged(gain(gained, batch, **picked(gain, knobs)), batch.label, **picked(_judged, knobs))

    of_sequences.__signature__ = shared_signature(gain, _judged)  # pyright: ignore[reportAttributeAccessIssue]
    return loss(unit="sequence", idle=_without_weight)(of_sequences)


@_of_labels
def kto(gained: Tensor, batch: Batch, *, beta: Positive = 0.1) -> Tensor:
    """desirable_weight s(beta (kl - d)) if batch.label, else undesirable_weight s(beta (d - kl)). arXiv:2402.01306.

    d = l - l_ref; kl = batch.kl, the baseline of `fastpost.losses.kl.kto_baseline`, a constant.
    """
    return beta * (gained - batch.kl)


@_of_labels
def apo_zero_unpaired(gained: Tensor, batch: Batch, *, beta: Positive = 0.1) -> Tensor:
    """desirable_weight s(-beta d) if batch.label, else undesirable_weight s(beta d). arXiv:2408.06266.

    apo_zero of sequences that have no mate: KTO with the baseline 0.
    """
    return beta * gained
