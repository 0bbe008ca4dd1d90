"""Metrics of a process reward model: of steps with labels, and of the first wrong step of a solution."""

from __future__ import annotations

from torch import Tensor

from fastpost.metrics.parts import Part, mean


def steps(
    scores: Tensor,  # (N,) logits of "right"
    labels: Tensor,  # (N,) in [0, 1]: how probably it is right
) -> dict[str, Part]:
    """accuracy, the share of steps that are on the right side of 1/2; accuracy/right and accuracy/wrong, of those that
    are right and wrong: where nearly all steps are right, accuracy says little; probability, the mean of what it says.
    """
    right, said = labels > 0.5, scores > 0
    agree = said == right
    return {
        "accuracy": mean(agree),
        "accuracy/right": mean(agree, right),
        "accuracy/wrong": mean(agree, ~right),
        "probability": mean(scores.sigmoid()),
    }
