"""Reward models: a scalar head's score of a sequence, or of each step of one."""

import torch.nn.functional as F
from torch import Tensor

from fastpost.equation import scalar_loss
from fastpost.knobs import NonNegative
from fastpost.types import Batch


@scalar_loss(unit="pair")
def bradley_terry(scores: Tensor, batch: Batch, *, center_rewards_coefficient: NonNegative = 0.0) -> Tensor:  # (S / 2,)
    """-log s(R_w - R_r - margin) + center_rewards_coefficient (R_w + R_r)^2. arXiv:2204.05862.

    scores: (S,). margin: batch.margin, 0 unless given (arXiv:2307.09288). The second term keeps scores around 0
    (arXiv:2312.09244).
    """
    chosen, rejected = batch.pairs(scores)
    return (
        -F.logsigmoid(batch.beyond_margin(chosen - rejected))
        + center_rewards_coefficient * (chosen + rejected).square()
    )


@scalar_loss(unit="token")
def prm(scores: Tensor, batch: Batch) -> Tensor:  # (T,) or (T, C)
    """Cross entropy of a step's label at its last token. arXiv:2211.14275, arXiv:2305.20050.

    batch.target holds the label of a step where it ends, -100 elsewhere: 0 or 1 for scores (T,), the logits of "right";
    a class for scores (T, C).
    """
    if scores.ndim == 2:
        return F.cross_entropy(scores, batch.target, reduction="none")
    return F.binary_cross_entropy_with_logits(scores, batch.target.to(scores.dtype), reduction="none")
