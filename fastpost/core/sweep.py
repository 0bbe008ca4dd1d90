"""A way through the logits of (rows, vocabulary) tile by tile, in a workspace whose size depends on neither T nor V.

Rows are cut into chunks; within a chunk the vocabulary is cut into blocks of columns; a tile is one product of the two,
fp32. `fastpost.core.chunk` makes statistics or gradients of a chunk. A sweep is streamed (a tile is gone once
folded) or held (a chunk's whole rows stay until its gradients are made; fewer rows then fit, but no tile is computed
twice).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastpost.core import rows as row_math
from fastpost.core import topk
from fastpost.core.gemm import Gemm, Packed, wide
from fastpost.core.problem import Operands, Problem, cut
from fastpost.core.rows import Shape

# Bytes of tiles, blocks and accumulators that a sweep may hold, and the columns of a tile: on a CPU its scratch stays
# near the caches. Where whole rows of logits are held every chunk reads and packs the head anew: at V 131072 that takes
# a third as long as the products of the 90 rows that 56 MB have room for, and a twelfth of those of 360.
WORKSPACE = {"cpu": 56 << 20, "cuda": 384 << 20}
WORKSPACE_HELD = {"cpu": 192 << 20, "cuda": 384 << 20}
COLUMNS = {"cpu": 960, "cuda": 8192}  # 960: whole panels of 12 and of 32, see csrc/gemm.h
MOST_ROWS = 4096
PANEL = {"cpu": 12, "cuda": 128}  # rows of a tile that are multiplied together: a chunk has whole ones


def spans(total: int, most: int, multiple: int = 1) -> Iterator[slice]:
    """As few pieces as `most` allows, and alike: of as many multiples each, but for the last."""
    if total > most > multiple:
        most -= most % multiple
    pieces = max(1, -(-total // most))
    each = max(1, min(most, -(-total // (pieces * multiple)) * multiple))
    for start in range(0, total, each):
        yield slice(start, min(start + each, total))


def apart(V: int) -> int:
    """How far whole rows of V logits lie from each other: each on a cache line, and an odd number of 32 of them, since
    with a power of two a column of a tile would lie in one set of the cache, which has fewer ways than a tile rows."""
    return 32 * (-(-V // 32) | 1)


def row_kernels(device: torch.device, dtype: torch.dtype):
    """The fastest row kernels for tiles of `dtype`: Triton's on a GPU, the C++ twin's on a CPU, else torch's."""
    try:
        if device.type == "cuda" and dtype == torch.float32:
            # (pyright does not see that fastpost.kernels is kernels/triton)
            from fastpost.kernels.rows import TritonRows  # pyright: ignore[reportMissingImports]

            return TritonRows()
        if device.type == "cpu" and dtype == torch.float32:
            from fastpost.core.native import NativeRows

            return NativeRows()
    except ImportError:
        pass
    return row_math.TorchRows()


class Columns(NamedTuple):
    """A block of the vocabulary, ready to be multiplied."""

    span: slice
    weight: Tensor  # (B, D)
    b: Tensor | None  # (B, r)
    shape: Shape
    weight_q: Tensor | None  # (B, D_q)
    b_q: Tensor | None  # (B, r_q)
    shape_q: Shape | None


class Chunk(NamedTuple):
    """Some of the kept rows, ready to be multiplied."""

    rows: slice  # of the N kept
    hidden: Tensor  # (R, D)
    packed: Packed | None  # the same, as fused steps take it
    low: Tensor | None  # (R, r)
    hidden_q: Tensor | None  # (R, D_q)
    packed_q: Packed | None
    low_q: Tensor | None  # (R, r_q)
    target: Tensor  # (R,)
    inverse_temperature: Tensor | None  # (R,)
    logits: Tensor | None  # (R, V) raw products, where they are held
    logits_q: Tensor | None

    @property
    def first(self) -> bool:
        """Whether it is the one that writes dW, to which the others add."""
        return self.rows.start == 0


def _shape(x: Operands, span: slice, scale: float, softcap: float | None) -> Shape:
    return Shape(None if x.bias is None else x.bias[span], scale, softcap)


class Sweep:
    """A way through the tiles of the raw logits in a bounded workspace.

    `held`: a chunk's logits stay; `keeps`: what the kernels make of them for products does. Either may fill `spare`
    bytes besides.
    """

    def __init__(self, p: Problem, operands: Operands, *, held: bool, keeps: bool = False, spare: int = 0):
        self.p, self.operands, self.held = p, operands, held
        self.V, self.D = operands.weight.shape
        self.vocabulary = self.V if p.shard is None else p.shard.vocabulary
        self.device = operands.weight.device
        self.kind = "cpu" if self.device.type == "cpu" else "cuda"
        self.panel = PANEL[self.kind]
        self.wide = wide(p.dtype)
        self.gemm = Gemm(p.dtype, self.device)
        self.kernels = row_kernels(self.device, self.wide)
        # The C++ extension, where it takes products and row kernels of a block in one step.
        sides = [operands] if p.dense is None else [operands, p.dense.operands]
        plain = p.teacher is None and all(x.low is None for x in sides)
        self.fused = self.gemm.native if plain else None
        self.room = None if self.fused is None else self.fused.Room()
        self._buffers: dict[str, Tensor] = {}
        self.columns_each, self.rows_each, self.workspace = self._plan(keeps, spare)

    def _plan(self, keeps: bool, spare: int) -> tuple[int, int, int]:
        """(columns, rows) of a tile, as many rows as there is room for after what a block of the head takes; and the
        bytes of both together."""
        wide, narrow, panel = self.wide.itemsize, self.gemm.tile_dtype.itemsize, self.gemm.panel_bytes
        dense = self.p.dense
        widths = self.operands.width + (dense.operands.width if dense else 0)
        V = self.V if self.p.shard is None else max(self.p.shard.sizes)  # all ranks must cut the same chunks
        fused = self.fused is not None
        most = WORKSPACE[self.kind] // (6 * widths * (panel if fused else wide))
        columns = min(V, max(64, min(COLUMNS[self.kind], most)))
        a_block = {
            "the head, widened": 0 if fused else wide * widths * columns,
            "its panels, and those of it transposed": 4 * panel * widths * columns if fused else 0,
        }
        a_row = {
            "hidden states, and an accumulator of their gradient": (narrow + wide) * widths,
            "their panels, and those of them transposed": 2 * panel * widths if fused else 0,
            "tiles, and the scratch of the row kernels": 0 if fused else wide * columns * (14 if dense else 8),
            "the gradient of a tile": narrow * columns if fused else 0,
            "logits": wide * V * (2 if dense else 1) if self.held else 0,
            "what is kept": narrow * V if keeps else 0,
        }
        room = (WORKSPACE_HELD if self.held else WORKSPACE)[self.kind] - sum(a_block.values())
        if self.held or keeps:
            room += spare
        rows = max(1, min(room // sum(a_row.values()), MOST_ROWS, len(self.p)))
        return columns, rows, sum(a_block.values()) + rows * sum(a_row.values())

    def _buffer(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Scratch of this shape, kept between tiles."""
        numel = shape[0] * shape[1]
        held = self._buffers.get(name)
        if held is None or held.numel() < numel or held.dtype != dtype:
            held = self._buffers[name] = torch.empty(numel, dtype=dtype, device=self.device)
        return held[:numel].view(shape)

    def _whole_rows(self, name: str, n: int) -> Tensor:  # (n, V)
        return self._buffer(name, (n, apart(self.V)), self.wide)[:, : self.V]

    def chunks(self) -> Iterator[slice]:
        return spans(len(self.p), self.rows_each, self.panel)

    def open(self, rows: slice) -> Chunk:
        p, n = self.p, rows.stop - rows.start
        hidden, low = self._left(self.operands, rows, "hidden")
        hidden_q, low_q = self._left(p.dense.operands, rows, "hidden q") if p.dense else (None, None)
        return Chunk(
            rows,
            hidden,
            self._packed(hidden),
            low,
            hidden_q,
            self._packed(hidden_q),
            low_q,
            p.target[rows],
            None if p.inverse_temperature is None else p.inverse_temperature[rows],
            self._whole_rows("logits", n) if self.held else None,
            self._whole_rows("logits q", n) if self.held and p.dense else None,
        )

    def _left(self, x: Operands, rows: slice, buffer: str) -> tuple[Tensor, Tensor | None]:  # (R, D), (R, r)
        hidden = self.gemm.operand(cut(x.hidden, self.p.index, rows), buffer)
        return hidden, None if x.low is None else x.low[rows]

    def _packed(self, hidden: Tensor | None) -> Packed | None:
        return self.fused.pack(hidden) if self.fused is not None and hidden is not None else None

    def packed_across(self, chunk: Chunk) -> Packed | None:
        """A chunk's hidden states as the products of dW take them."""
        return None if self.gemm.native is None else self.gemm.native.pack_across(chunk.hidden)

    def columns(self, *, multiplied: bool = True, again: bool = False) -> Iterator[Columns]:
        """Blocks of the vocabulary; unless they are to be multiplied no weight is widened, and `again`, for tiles that
        are held, not the reference's."""
        p, x, q = self.p, self.operands, self.p.dense
        for start in range(0, self.V, self.columns_each):
            span = slice(start, min(start + self.columns_each, self.V))
            weight = self.gemm.operand(x.weight[span], "weight") if multiplied else x.weight[span]
            weight_q = b_q = shape_q = None
            if q is not None:
                # The reference of a LoRA policy has the very same weight: its block is widened once.
                same = q.operands.weight is x.weight
                unused = same or again or not multiplied
                weight_q = weight if unused else self.gemm.operand(q.operands.weight[span], "weight q")
                b_q, shape_q = self._low_block(q.operands, span), _shape(q.operands, span, q.scale, q.softcap)
            shape = _shape(x, span, p.scale, p.softcap)
            yield Columns(span, weight, self._low_block(x, span), shape, weight_q, b_q, shape_q)

    def _low_block(self, x: Operands, span: slice) -> Tensor | None:  # (B, r)
        return None if x.b is None else x.b[span].to(self.wide)

    def tiles(self, chunk: Chunk, block: Columns, *, again: bool = False) -> tuple[Tensor, Tensor | None]:
        """The raw logits, but for the bias, of policy and reference; `again`: take them from where they are held."""
        tile, tile_q = self._room("tile", chunk, block, chunk.logits), None
        if not (again and self.held):
            self._multiply(tile, chunk.hidden, block.weight, chunk.low, block.b)
        if chunk.hidden_q is not None and block.weight_q is not None:
            tile_q = self._room("tile q", chunk, block, chunk.logits_q)
            if not (again and self.held):
                self._multiply(tile_q, chunk.hidden_q, block.weight_q, chunk.low_q, block.b_q)
        return tile, tile_q

    def dlogits(self, chunk: Chunk, block: Columns) -> Tensor:  # (R, B)
        """Where a fused step writes the gradient of a tile."""
        return self._buffer("left operand", (len(chunk.target), block.span.stop - block.span.start), self.p.dtype)

    def _room(self, name: str, chunk: Chunk, block: Columns, held: Tensor | None) -> Tensor:  # (R, B)
        """Where a tile is, or is to be."""
        if held is not None:
            return held[:, block.span]
        return self._buffer(name, (len(chunk.target), block.span.stop - block.span.start), self.wide)

    def _multiply(self, tile: Tensor, hidden: Tensor, weight: Tensor, low: Tensor | None, b: Tensor | None) -> None:
        """tile = hidden @ weight.T + low @ b.T: neither W + B A nor [W, B] is ever made."""
        self.gemm.product(hidden, weight, tile)
        if low is not None and b is not None:
            self.gemm.add_product(tile, low, b.T)

    def scratch(self, tile: Tensor) -> Tensor:
        """A tile of the same size that may be overwritten."""
        return self._buffer("tile", (tile.shape[0], tile.shape[1]), self.wide)

    def kept_room(self, chunk: Chunk) -> Tensor:  # (V, R)
        """For what the kernels make of a chunk's tiles."""
        return self._buffer("kept", (self.V, len(chunk.target)), self.gemm.tile_dtype)

    def scratch_columns(self, block: Columns) -> Tensor:  # (B, D)
        return self._buffer("columns", (block.span.stop - block.span.start, self.D), self.wide)

    def teacher_outcomes(self, rows: slice) -> Tensor:  # (R, K + 1)
        teacher = self.p.teacher
        assert teacher is not None
        return topk.teacher_outcomes(teacher.logp[rows], teacher.rest, self.V, self.wide)

    def slope(self, z: Tensor, inverse_temperature: Tensor | None) -> Tensor:  # (R, K) tempered logits -> dz/draw
        slope = torch.full_like(z, self.p.scale)
        at_1 = z if inverse_temperature is None else z / inverse_temperature[:, None]
        if self.p.softcap is not None:
            slope *= 1 - (at_1 / self.p.softcap).square()
        return slope if inverse_temperature is None else slope * inverse_temperature[:, None]

    def left_operand(self, tile: Tensor) -> Tensor:
        """Where a kernel writes what `add_product` multiplies: the tile itself, unless the product wants another
        dtype."""
        if self.gemm.tile_dtype == tile.dtype:
            return tile
        return self._buffer("left operand", (tile.shape[0], tile.shape[1]), self.gemm.tile_dtype)
