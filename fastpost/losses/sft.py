"""Supervised fine-tuning: losses of one token's log-probability."""

from torch import Tensor

from fastpost.equation import loss
from fastpost.types import Batch, Stats


@loss(unit="token")
def sft(stats: Stats, batch: Batch) -> Tensor:
    """Negative log-likelihood: -log p[target], in nats. Unit: token."""
    return -stats.logp


@loss(unit="token", reads=("logp", "mean_logp"))
def smoothed_sft(stats: Stats, batch: Batch, *, label_smoothing: float = 0.1) -> Tensor:
    """Cross entropy to (1 - e) onehot + e / V (arXiv:1512.00567): -(1 - e) log p[target] - e mean_v log p[v].

    Unit: token.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    return -(1 - label_smoothing) * stats.logp - label_smoothing * stats.mean_logp
