"""Logistic regression with a Gaussian prior on each coefficient, by Newton's method, for many weightings of the rows.

  maximise  sum_i w_i (y_i log s(x_i b) + (1 - y_i) log s(-x_i b)) - sum_j r_j b_j^2 / 2,  0 <= y <= 1

A prior with r_j > 0 keeps b finite where a line divides the rows. A step that does not climb is halved until it does.
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
    beta, squares = x.new_zeros(len(weight), x.shape[1]), (x[:, :, None] * x[:, None, :]).flatten(1)  # (n, p p)
    height = _objective(x, y, weight, ridge, beta)
    for _ in range(STEPS):
        p = torch.sigmoid(beta @ x.T)  # (b, n)
        gradient = (weight * (y - p)) @ x - ridge * beta
        curvature = (weight * p * (1 - p) @ squares).unflatten(1, (len(ridge), -1)) + torch.diag(ridge)
        step, before = torch.linalg.solve(curvature, gradient), height
        for _ in range(HALVINGS):
            height = _objective(x, y, weight, ridge, beta + step)
            lower = (height < before) & ~_last(step, beta)  # at the top, rounding decides which is lower
            if not lower.any():
                break
            step[lower] /= 2
        beta = beta + step
        if _last(step, beta).all():
            break
    return beta


def _last(step: Tensor, beta: Tensor) -> Tensor:  # (b, p) -> (b,) bool
    """Newton's method squares the error: no step after one below the root of eps matters."""
    return (step.abs() <= torch.finfo(step.dtype).eps ** 0.5 * (1 + beta.abs())).all(1)


def _objective(x: Tensor, y: Tensor, weight: Tensor, ridge: Tensor, beta: Tensor) -> Tensor:  # (b,)
    logits = beta @ x.T
    return (weight * (y * logits - F.softplus(logits))).sum(1) - (ridge * beta.square()).sum(1) / 2
