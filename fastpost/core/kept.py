"""Gradients of logp from the exponentials that the statistics left: a loss of logp alone never looks at a logit twice.

The fold writes e^(z_v - m) dz_v/dlogit_v of every tile, m the row's maximum so far, as the frozen schedule multiplies
it into U = dlogp/dhidden. Kept, in the dtype of the operands, it is dL/dlogit but for a factor a row,

  -dL/dlogp e^(m - M) / S,  M and S the final maximum and sum,

and the target's own column, which is set from logp in fp32: 1 - p keeps its digits where p is near one. So each tile
takes half the room of its logits, and the gradient no second exponential: 3 G with W trained, any unit whose rows fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastpost.core import rows as row_math
from fastpost.core.sweep import Chunk, Columns, Sweep


@dataclass(frozen=True)
class Kept:
    """The exponentials of a chunk, a tile (R, B) for each block, and the maxima (R,) that each is relative to."""

    room: Tensor  # (V, K): the first R B numbers of a block's rows hold its tile
    tiles: list[tuple[slice, Tensor]] = field(default_factory=list)
    maxima: list[Tensor] = field(default_factory=list)

    def tile(self, chunk: Chunk, block: Columns) -> Tensor:  # (R, B)
        """Where the next tile goes."""
        rows, columns = len(chunk.target), block.span.stop - block.span.start
        tile = self.room[block.span].view(-1)[: rows * columns].view(rows, columns)
        self.tiles.append((block.span, tile))
        return tile

    def note(self, maximum: Tensor) -> None:
        self.maxima.append(maximum.clone())

    def dlogits(
        self, s: Sweep, chunk: Chunk, stats: Mapping[str, Tensor], dlogp: Tensor
    ) -> Iterator[Tensor]:  # (R, B) each
        """dL/dlogits of the tiles, in turn, each in its place."""
        if not self.tiles:
            return
        tempered = dlogp if chunk.inverse_temperature is None else dlogp * chunk.inverse_temperature
        shrunk = torch.stack(self.maxima).sub_(stats["max"]).sub_(stats["log_sum"]).exp_()  # (tiles, R)
        # The target's own slope; the other columns have the cap's already.
        own = -torch.expm1(stats["logp"]) * tempered * s.slope(stats["logit"][:, None], None)[:, 0]
        # (torch alone would make an fp32 copy of a bf16 tile)
        rescale = row_math.rescale if s.gemm.native is None else s.gemm.native.rescale
        for (span, tile), factor in zip(self.tiles, shrunk.mul_(-s.p.scale * tempered), strict=True):
            rescale(tile, factor, chunk.target, span.start, own)
            yield tile
