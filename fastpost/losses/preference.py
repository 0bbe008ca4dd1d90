"""Preferences: a chosen and a rejected sequence, adjacent in the batch."""

import torch.nn.functional as F
from torch import Tensor

from fastpost.equation import loss
from fastpost.types import Batch, Stats


@loss(unit="pair")
def dpo(stats: Stats, batch: Batch, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log s(beta d) - e log s(-beta d), s the sigmoid, e label_smoothing. Unit: pair. arXiv:2305.18290.

    d = sum_t (logp - ref_logp) of the chosen sequence less that of the rejected one. e > 0 is conservative DPO:
    a label is wrong with probability e (TRL 1.16 ignores label_smoothing in its sigmoid loss).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    chosen, rejected = batch.pairs(batch.per_sequence(stats.logp - batch.ref_logp))
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
