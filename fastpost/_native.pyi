"""csrc/. It may be missing: only fastpost/native.py and fastpost/packing/fit.py import it.

Tensors are on the CPU and have contiguous rows.
"""

from collections.abc import Sequence

from torch import Tensor

from fastpost.core.rows import Shape

LAYOUT: int
ISAS: list[str]  # the instruction sets of this CPU with which operands can be multiplied, best first; some want bf16

class Panels: ...  # a packed operand
class Room: ...  # where the head is packed, a block at a time; kept by whoever steps through them

def fold(
    state: Tensor,  # (STATE_ROWS, R) fp32, updated
    tile: Tensor,  # (R, B) fp32
    target: Tensor,  # (R,) int64
    start: int,
    shape: Shape,
    inverse_temperature: Tensor | None,  # (R,) fp32
    at_1: bool,  # the sums of "logp@1" too
    tile_q: Tensor | None,  # (R, B)
    shape_q: Shape | None,
    out: Tensor | None,  # (R, B) fp32 or bf16
) -> None: ...
def mixture(
    state: Tensor,  # (STATE_ROWS, R) fp32, updated
    tile: Tensor,  # (R, B) fp32
    shape: Shape,
    inverse_temperature: Tensor | None,  # (R,) fp32
    tile_q: Tensor,  # (R, B)
    shape_q: Shape,
    beta: float,
) -> None: ...
def grads(
    tile: Tensor,  # (R, B) fp32
    target: Tensor,  # (R,) int64
    start: int,
    shape: Shape,
    inverse_temperature: Tensor | None,  # (R,) fp32
    c: Tensor,  # (COEFFICIENT_ROWS, R)
    at_1: bool,  # "logp@1" has a gradient
    out: Tensor,  # (R, B) fp32 or bf16, may be the tile
    tile_q: Tensor | None,  # (R, B)
    shape_q: Shape | None,
    beta: float | None,  # of the JSD, if it has a gradient
) -> None: ...
def rescale(
    tile: Tensor,  # (R, B) bf16 or fp32, updated
    factor: Tensor,  # (R,) fp32
    target: Tensor,  # (R,) int64
    start: int,
    own: Tensor,  # (R,) fp32
) -> None: ...
def product(
    left: Tensor,  # (M, K) bf16 or fp32, one stride 1
    right: Tensor,  # (K, N), one stride 1
    out: Tensor,  # (M, N) fp32
    accumulate: bool,
    logits: bool,  # whether its sums are to be exact to fp32, or are a gradient's
    isa: str,
) -> None: ...
def pack(hidden: Tensor, isa: str) -> Panels: ...  # (R, D) bf16 or fp32 -> what the steps below take
def fold_block(
    room: Room,
    state: Tensor,  # (STATE_ROWS, R) fp32, updated
    target: Tensor,  # (R,) int64
    start: int,
    shape: Shape,
    inverse_temperature: Tensor | None,  # (R,) fp32
    at_1: bool,
    p: tuple[Panels, Tensor, Tensor | None],  # packed hidden states, the block's weight (B, D), held tile (R, B)
    q: tuple[Panels, Tensor, Tensor | None] | None,
    shape_q: Shape | None,
    total: Tensor | None,  # (R, D) fp32, rescaled and added to
    kept: Tensor | None,  # (R, B) in the weight's dtype, written
) -> None: ...
def grads_block(
    room: Room,
    target: Tensor,  # (R,) int64
    start: int,
    shape: Shape,
    inverse_temperature: Tensor | None,  # (R,) fp32
    c: Tensor,  # (COEFFICIENT_ROWS, R)
    at_1: bool,
    p: tuple[Panels, Tensor, Tensor | None],
    q: tuple[Panels, Tensor, Tensor | None] | None,
    shape_q: Shape | None,
    beta: float | None,
    made: bool,  # the held tiles have their products already
    dlogits: Tensor,  # (R, B) bf16 or fp32, written
    dhidden: Tensor | None,  # (R, D) fp32, added to
) -> None: ...
def pack_across(hidden: Tensor, isa: str) -> Panels: ...  # (R, D) -> what the next step takes
def weight_block(
    dlogits: Tensor,  # (R, B) bf16 or fp32, which may lie in dweight's memory
    hidden: Panels,  # packed across
    dweight: Tensor,  # (B, D) fp32, added to
    fresh: bool,  # it is written instead, and may be bf16
) -> None: ...
def best_fit(sizes: Sequence[int], room: int) -> list[int]: ...  # sizes of 1 to room -> the pack of each
