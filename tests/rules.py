"""The error rule of the tests: a result is judged against float64, and the yardstick is plain torch at the same work.

  statistics   max |ours - truth|  <=  2 max |torch - truth| + 1e-5            (torch: in fp32, on the same inputs)
  gradients    |ours - truth|_F    <=  2 |torch - truth|_F + eps32 |truth|_F   (torch: in the dtype of the inputs)

There is no tolerance to choose: what torch loses to rounding, ours may lose twice, and where torch is exact, ours is.
A loss is a function of statistics, so it is allowed, beyond that, what it makes of their slack.
"""

from __future__ import annotations

import torch
from torch import Tensor

STATISTIC_SLACK = 1e-5
GRADIENT_SLACK = torch.finfo(torch.float32).eps  # relative to the norm of the truth


def assert_close_to_truth(
    ours: Tensor, same_dtype: Tensor, truth: Tensor, name: str = "statistic", slack: float = STATISTIC_SLACK
) -> None:
    """The rule for a statistic, or for any number that is compared in absolute terms."""
    got, yardstick, want = _doubles(name, ours, same_dtype, truth)
    error, allowed = _worst(got - want), 2 * _worst(yardstick - want) + slack
    assert error <= allowed, f"{name}: worst error {error:.2e}, torch's own allows {allowed:.2e}"


def assert_gradient_close_to_truth(
    ours: Tensor, same_dtype: Tensor, truth: Tensor, name: str = "gradient", slack: float = 0.0
) -> None:
    """The rule for a gradient, or for any tensor that is compared as a whole. A truth of zero asks for zero."""
    got, yardstick, want = _doubles(name, ours, same_dtype, truth)
    error, allowed = (got - want).norm(), 2 * (yardstick - want).norm() + GRADIENT_SLACK * want.norm() + slack
    assert error <= allowed, f"{name}: error {error:.2e} of norm {want.norm():.2e}, torch's own allows {allowed:.2e}"


def _doubles(name: str, *tensors: Tensor) -> list[Tensor]:
    shapes = [tuple(t.shape) for t in tensors]
    assert len(set(shapes)) == 1, f"{name}: shapes of ours, torch's and the truth differ: {shapes}"
    assert tensors[-1].dtype == torch.float64, f"{name}: the truth must be float64, got {tensors[-1].dtype}"
    return [t.detach().double().cpu() for t in tensors]


def _worst(error: Tensor) -> float:
    """NaN, which fails every comparison, if there is one."""
    return float(error.abs().max()) if error.numel() else 0.0
