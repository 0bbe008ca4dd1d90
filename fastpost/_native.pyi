"""csrc/rows.cpp. It may be missing: only fastpost/native.py imports it."""

from torch import Tensor

LAYOUT: int

def fold(
    state: Tensor,  # (STATE_ROWS, R) fp32, updated
    tile: Tensor,  # (R, B) fp32
    target: Tensor,  # (R,) int64
    start: int,
    inverse_temperature: Tensor | None,  # (R,) fp32
    at_1: bool,  # the sums of "logp@1" too
    tile_q: Tensor | None,  # (R, B)
    out: Tensor | None,  # (R, B)
) -> None: ...
def grads(
    tile: Tensor,  # (R, B) fp32
    target: Tensor,  # (R,) int64
    start: int,
    inverse_temperature: Tensor | None,  # (R,) fp32
    c: Tensor,  # (COEFFICIENT_ROWS, R) fp32
    at_1: bool,  # "logp@1" has a gradient
    out: Tensor,  # (R, B), may be the tile
    tile_q: Tensor | None,  # (R, B)
) -> None: ...
