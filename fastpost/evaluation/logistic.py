"""Logistic regression with a Gaussian prior on each coefficient, by Newton's method, for many weightings of the rows.

  maximise  sum_i w_i (y_i log s(x_i b) + (1 - y_i) log s(-x_i b)) - sum_j r_j b_j^2 / 2,  0 <= y <= 1

A prior with r_j > 0 keeps b finite where a line divides the rows. Without a step that is too long each one climbs: it
is halved until it does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 100
HALVINGS = 30


def fit(
    x: Tensor,  # (n, p) float64
    y: Tensor,  # (n,)
    weight: Tensor,  # (b, n)
    ridge: Tensor,  # (p,) r
) -> Tensor:  # (b, p)
    """The coefficients for each weighting."""
    beta = x.new_zeros(len(weight), x.shape[1])
    for _ in range(STEPS):
        p = torch.sigmoid(beta @ x.T)  # (b, n)
        gradient = (weight * (y - p)) @ x - ridge * beta
        curvature = torch.einsum("bn,ni,nj->bij", weight * p * (1 - p), x, x) + torch.diag(ridge)
        step = torch.linalg.solve(curvature, gradient)
        scale = x.new_ones(len(weight), 1)
        before = _objective(x, y, weight, ridge, beta)
        for _ in range(HALVINGS):
            lower = _objective(x, y, weight, ridge, beta + scale * step) < before
            if not lower.any():
                break
            scale[lower] /= 2
        beta = beta + scale * step
        if (step.abs() <= torch.finfo(x.dtype).eps ** 0.5 * (1 + beta.abs())).all():
            break  # Newton's method squares the error: this step was the last that matters
    return beta


def _objective(x: Tensor, y: Tensor, weight: Tensor, ridge: Tensor, beta: Tensor) -> Tensor:  # (b,)
    logits = beta @ x.T
    return (weight * (y * logits - F.softplus(logits))).sum(1) - (ridge * beta.square()).sum(1) / 2
