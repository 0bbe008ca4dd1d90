"""Distillation: divergences from a teacher q, each over the whole vocabulary of one token, in nats.

The teacher is `reference` of the head's calls: (hidden, head), or a stored `TopK`. Both distributions are at the call's
temperature; a gradient through it is 1 / temperature as large, so tau^2 restores it where losses are mixed.
"""

from torch import Tensor

from fastpost.equation import loss
from fastpost.knobs import Fraction, Positive
from fastpost.types import Batch, Stats


@loss(unit="token", reads=("forward_kl",))
def forward_kl(stats: Stats, batch: Batch) -> Tensor:
    """KL(q || p): covers all that the teacher would say. arXiv:1503.02531."""
    return stats.forward_kl


@loss(unit="token", reads=("reverse_kl",))
def reverse_kl(stats: Stats, batch: Batch) -> Tensor:
    """KL(p || q): keeps to what the teacher would say. arXiv:2306.08543."""
    return stats.reverse_kl


@loss(unit="token", reads=("jsd",))
def gkd(stats: Stats, batch: Batch) -> Tensor:
    """b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p, with b = jsd_beta of the call. arXiv:2306.13649.

    jsd_beta 0 and 1 give the forward and the reverse KL, as in TRL.
    """
    return stats.jsd


@loss(unit="token", reads=(), also={"logp@1": lambda k: k["alpha"] > 0, "forward_kl": lambda k: k["alpha"] < 1})
def kd(stats: Stats, batch: Batch, *, alpha: Fraction = 0.5, temperature: Positive = 1.0) -> Tensor:
    """-alpha log p_1[y] + (1 - alpha) tau^2 KL(q || p), p_1 at temperature 1, tau = temperature. arXiv:1503.02531.

    `fused_loss` passes its own temperature on. At alpha 1 there need be no teacher.
    """
    if alpha == 0:
        return temperature**2 * stats.forward_kl
    nll = -alpha * stats.logp_at_1
    return nll if alpha == 1 else nll + (1 - alpha) * temperature**2 * stats.forward_kl
