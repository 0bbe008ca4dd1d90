"""Whether a step is the right one: its loss, and the gradient of every tensor, against float64 by the rule of truth.py.

Gradients are of hundreds of megabytes and made in different processes, so they meet in files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from step import Trainee
from truth import OTHERS_ALLOWANCE


def write_gradients(path: str, trainee: Trainee) -> list[float]:
    """A step whose gradients are written down before they are clipped; returns parts of its loss."""
    parts = trainee.accumulate()
    save_file({name: gradient.contiguous() for name, gradient in trainee.gradients().items()}, path)
    trainee.update()
    return parts.double().tolist()


@dataclass(frozen=True)
class Rule:
    """|it - truth| <= factor |plain torch - truth| + slack."""

    factor: float
    slack: float  # relative to the truth's norm

    @staticmethod
    def of(ours: bool, dtype: str) -> Rule:
        if ours:
            return Rule(2.0, torch.finfo(torch.float32).eps)
        return Rule(OTHERS_ALLOWANCE, 2 * torch.finfo(getattr(torch, dtype)).eps)


def _distances(files: Sequence[Path]) -> Iterator[tuple[str, float, float, float]]:
    """Of each tensor: its name, how far both are from the truth, and the truth's norm."""
    its, plain, truth = (safe_open(file, "pt") for file in files)
    for name in truth.keys():  # noqa: SIM118  (it is no mapping)
        want = truth.get_tensor(name)
        found = [
            float((x.get_tensor(name).double() - want).norm()) if name in x.keys() else float("nan")  # noqa: SIM118
            for x in (its, plain)
        ]
        yield name, *found, float(want.norm())


def judged(
    rule: Rule,
    files: Sequence[Path],  # gradients: its own, plain torch's, the truth's
    losses: Sequence[Sequence[float]],  # parts, of the same three
) -> tuple[dict[str, float], str]:
    """Its errors, and what is wrong if something is.

    A loss is a mean of its parts, so it may err as far as the parts of plain torch's do together: those may cancel in
    their sum, by luck.
    """
    its, plain, truth = losses
    off = abs(sum(its) - sum(truth))
    allowed = rule.factor * sum(abs(a - b) for a, b in zip(plain, truth, strict=True)) + 1e-5
    wrong = [] if off <= allowed else [f"loss off by {off:.1e}, allowed {allowed:.1e}"]
    total = norm = 0.0
    for name, error, yardstick, size in _distances(files):
        total, norm = total + error**2, norm + size**2
        if not error <= (allowed := rule.factor * yardstick + rule.slack * size):
            wrong.append(f"gradient of {name} off by {error:.1e}, allowed {allowed:.1e}")
    return {"loss": off, "gradient": (total / norm) ** 0.5}, "; ".join(wrong[:3])
