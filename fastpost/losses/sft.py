"""Supervised fine-tuning: losses of one token's log-probability. y is the token to be predicted."""

from torch import Tensor

from fastpost.equation import loss
from fastpost.knobs import Fraction, NonNegative
from fastpost.types import Batch, Stats


@loss(unit="token", also={"mean_logp": lambda k: k["label_smoothing"], "lse": lambda k: k["z_loss"]})
def sft(stats: Stats, batch: Batch, *, label_smoothing: Fraction = 0.0, z_loss: NonNegative = 0.0) -> Tensor:
    """-(1 - e) log p[y] - e mean_v log p[v] + z_loss lse^2, with e = label_smoothing.

    Both knobs are 0 unless given: the negative log-likelihood, in nats. label_smoothing: cross entropy to
    (1 - e) onehot + e / V (arXiv:1512.00567). z_loss: keeps the logits' normaliser near 1 (arXiv:2204.02311, 1e-4).
    """
    nll = -stats.logp
    if label_smoothing:
        nll = (1 - label_smoothing) * nll - label_smoothing * stats.mean_logp
    return nll + z_loss * stats.lse.square() if z_loss else nll


@loss(unit="token")
def dft(stats: Stats, batch: Batch) -> Tensor:
    """-sg(p[y]) log p[y], sg a constant: the policy gradient of a reward that does not explode. arXiv:2508.05629."""
    return -stats.logp.detach().exp() * stats.logp
