"""One chunk of rows: statistics from all its tiles (`fold_chunk`), or gradients (`grad_chunk`).

A stored top-k teacher names columns of its own in every row. `Picks` reads and writes them in a tile, `Named` knows
their gradient; both are idle without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch
from torch import Tensor

from fastpost.core import fused, topk
from fastpost.core import rows as row_math
from fastpost.core.gemm import Packed
from fastpost.core.kept import Kept
from fastpost.core.rows import C_P, LOWEST, MAX, P_M, Q_M, SUM, TARGET
from fastpost.core.shard import add_up, join
from fastpost.core.sweep import Chunk, Columns, Sweep
from fastpost.types import NEEDS_REFERENCE


class Picks:
    """The columns of a chunk that a stored teacher names, and the policy's sum over all the others."""

    def __init__(self, ids: Tensor, s: Sweep):  # (R, K)
        self.ids, self.scale, self.softcap = ids, s.p.scale, s.p.softcap
        self.raw = torch.full(ids.shape, LOWEST, dtype=s.wide, device=s.device)
        self.rest = row_math.new_state(len(ids), s.device, s.wide)
        self.bias = None if s.operands.bias is None else s.operands.bias[ids]

    def where(self, block: Columns) -> tuple[Tensor, Tensor]:  # (R, K) columns of the block, and which ids are in it
        column = (self.ids - block.span.start).clamp(0, block.span.stop - block.span.start - 1)
        return column, column == self.ids - block.span.start

    def fold(self, s: Sweep, tile: Tensor, block: Columns, chunk: Chunk) -> None:
        """Takes the named columns out of the tile, folds what is left, and puts them back."""
        column, here = self.where(block)
        found = tile.gather(1, column)
        self.raw = torch.where(here, found, self.raw)
        # amin and amax, so that an id of another block, clamped onto a column of this one, does nothing to it.
        low = torch.where(here, LOWEST, torch.inf).to(tile.dtype)
        tile.scatter_reduce_(1, column, low, "amin")
        s.kernels.fold(
            self.rest, tile, chunk.target, block.span.start, block.shape, chunk.inverse_temperature, frozenset()
        )
        tile.scatter_reduce_(1, column, torch.where(here, found, -torch.inf), "amax")

    def _at_1(self) -> Tensor:  # (R, K) logits at temperature 1
        raw = self.raw if self.bias is None else (self.raw + self.bias).clamp(min=LOWEST)
        z = raw * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def outcomes(self, state: Tensor, inverse_temperature: Tensor | None, vocabulary: int) -> Tensor:  # (R, K + 1)
        """The policy's log-probabilities of the named tokens and of all the others together, if there are others."""
        z = self._at_1() if inverse_temperature is None else self._at_1() * inverse_temperature[:, None]
        maximum, log_sum, K = state[MAX], state[SUM].log(), z.shape[1]
        named = z - maximum[:, None] - log_sum[:, None]
        if vocabulary == K:
            return named
        total = self.rest[SUM]
        if self.softcap is not None:
            # A cap lifts the columns that were taken out to -softcap each: here they leave the sum.
            lowest = -self.softcap if inverse_temperature is None else -self.softcap * inverse_temperature
            total = total - K * (lowest - self.rest[MAX]).exp()
        return torch.cat([named, (self.rest[MAX] - maximum + total.log() - log_sum)[:, None]], 1)

    def put(self, left: Tensor, block: Columns, values: Tensor) -> None:  # (R, B), (R, K)
        """The named columns of a tile become `values`."""
        # By two additions, so that an id of another block, clamped onto a column of this one, does nothing to it.
        column, here = self.where(block)
        old = torch.where(here, left.gather(1, column), 0)
        left.scatter_add_(1, column, -old)
        left.scatter_add_(1, column, torch.where(here, values.to(left.dtype), 0))


def fold_chunk(
    s: Sweep, chunk: Chunk, u: Tensor | None = None, u_low: Tensor | None = None, kept: Kept | None = None
) -> dict[str, Tensor]:
    """The statistics of these rows from all their tiles; and, into u (R, D) and u_low (R, r), their
    sum_v p_v dz_v/dlogit_v W_v and the same sum of B_v, over all v but the target. What those were made of is kept."""
    p, inverse = s.p, chunk.inverse_temperature
    state = row_math.new_state(len(chunk.target), s.device, s.wide)
    picks = None if p.teacher is None else Picks(p.teacher.ids[chunk.rows], s)
    wants = p.row_wants
    for block in s.columns():
        left = None if kept is None else kept.tile(chunk, block)
        if s.fused is not None:
            fused.fold(s, chunk, block, state, wants, u, left)
        else:
            _fold_tile(s, chunk, block, state, picks, u, u_low, left)
        if kept is not None:
            kept.note(state[MAX])
    if p.shard is not None:
        decay = join(state, chunk.target, p.shard)
        for total in (u, u_low):
            if total is not None:
                total.mul_(decay[:, None])
    stats = row_math.finish(state, wants, s.vocabulary, inverse)
    if "jsd" in wants:
        stats |= _mixture(s, chunk, state)
    if picks is not None and p.teacher is not None:
        stats["outcomes"] = picks.outcomes(state, inverse, s.V)
        stats |= topk.divergences(stats["outcomes"], s.teacher_outcomes(chunk.rows), p.wants, p.jsd_beta)
    for total in (u, u_low):
        if total is not None:
            total.div_(state[SUM, :, None])
    if u is not None or kept is not None:
        stats["logit"] = state[TARGET]
    return stats


def _fold_tile(
    s: Sweep,
    chunk: Chunk,
    block: Columns,
    state: Tensor,
    picks: Picks | None,
    u: Tensor | None,
    u_low: Tensor | None,
    left: Tensor | None,  # (R, B) where the left operand of the sums is to stay; None: anywhere
) -> None:
    tile, tile_q = s.tiles(chunk, block)
    if picks is not None:
        picks.fold(s, tile, block, chunk)
    before, inverse = state[MAX].clone(), chunk.inverse_temperature
    if left is None and u is not None:
        left = s.left_operand(tile if not s.held else s.scratch(tile))
    s.kernels.fold(
        state, tile, chunk.target, block.span.start, block.shape, inverse, s.p.row_wants, tile_q, block.shape_q, left
    )
    for total, factor in ((u, block.weight), (u_low, block.b)):
        if total is not None and factor is not None and left is not None:
            total.mul_((before - state[MAX]).exp_()[:, None])
            s.gemm.add_product(total, left, factor)


def _mixture(s: Sweep, chunk: Chunk, state: Tensor) -> dict[str, Tensor]:
    """The JSD's integrand needs finished logsumexps: a second look at tiles that are still there."""
    assert s.held, "the JSD needs whole rows"
    for block in s.columns(multiplied=False):
        tile, tile_q = s.tiles(chunk, block, again=True)
        assert tile_q is not None and block.shape_q is not None
        s.kernels.mixture(state, tile, block.shape, chunk.inverse_temperature, tile_q, block.shape_q, s.p.jsd_beta)
    add_up(state[P_M : Q_M + 1], s.p.shard)
    return row_math.finish_mixture(state, s.p.jsd_beta)


class Totals(NamedTuple):
    """Where gradients go, each in fp32 or wider; None: not wanted. The order is that of Operands, after hidden."""

    weight: Tensor | None  # (V, D), of no content until the first chunk; of a single chunk, in its final dtype
    bias: Tensor | None  # (V,)
    low: Tensor | None  # (N, r)
    b: Tensor | None  # (V, r)

    def add(self, s: Sweep, chunk: Chunk, block: Columns, left: Tensor, across: Packed | None) -> None:
        """What a block of the head gains from left (R, B) = dL/dtile, which may lie where dW will; across:
        `packed_across` of the chunk."""
        if self.bias is not None:
            self.bias[block.span] += left.sum(0, dtype=self.bias.dtype)
        if self.b is not None and chunk.low is not None:
            s.gemm.add_product(self.b[block.span], left.T, chunk.low)
        if self.weight is None:
            return
        there = self.weight[block.span]
        if across is not None and there.dtype in (s.p.dtype, s.wide):
            fused.add_weight(s, left, across, there, fresh=chunk.first)
            return
        # Sums are not made in a narrow dtype, nor where their operand lies.
        inside = left.untyped_storage().data_ptr() == there.untyped_storage().data_ptr()
        room = s.scratch_columns(block) if inside or there.dtype != s.wide else there
        s.gemm.add_product(room, left.T, chunk.hidden, fresh=chunk.first)
        if room is not there:
            there.copy_(room)


def keep_chunk(
    s: Sweep,
    chunk: Chunk,
    kept: Kept,
    stats: Mapping[str, Tensor],
    dlogp: Tensor,  # (R,)
    totals: Totals,
) -> None:
    """What these rows add to the totals of the head, from what `fold_chunk` kept."""
    across = s.packed_across(chunk) if totals.weight is not None else None
    for block, left in zip(s.columns(multiplied=False), kept.dlogits(s, chunk, stats, dlogp), strict=True):
        totals.add(s, chunk, block, left, across)


def grad_chunk(
    s: Sweep,
    chunk: Chunk,
    stats: Mapping[str, Tensor],  # of the chunk, from fold_chunk
    d: Mapping[str, Tensor],  # (R,) dL/dstatistic
    dhidden: Tensor | None,  # (R, D), zero; added to
    totals: Totals,
) -> None:
    """dL/dhidden of these rows, and what they add to the totals."""
    p = s.p
    on_rows = {n: g for n, g in d.items() if p.teacher is None or n not in NEEDS_REFERENCE}
    on_teacher = {n: g for n, g in d.items() if n not in on_rows}
    c = row_math.coefficients(stats, on_rows, s.vocabulary, p.jsd_beta)
    named = None if not on_teacher else Named(s, chunk, stats, on_teacher, c, on_rows.keys())
    across = s.packed_across(chunk) if totals.weight is not None else None
    for block in s.columns(again=s.held):
        if s.fused is not None:
            left = fused.grads(s, chunk, block, c, on_rows.keys(), dhidden)
        else:
            left = _grad_tile(s, chunk, block, c, on_rows.keys(), named)
            if dhidden is not None:
                s.gemm.add_product(dhidden, left, block.weight)
        if totals.low is not None and block.b is not None:
            s.gemm.add_product(totals.low[chunk.rows], left, block.b)
        totals.add(s, chunk, block, left, across)
    add_up(dhidden, p.shard)
    add_up(None if totals.low is None else totals.low[chunk.rows], p.shard)


def _grad_tile(
    s: Sweep, chunk: Chunk, block: Columns, c: Tensor, wants: AbstractSet[str], named: Named | None
) -> Tensor:  # (R, B)
    """dL/dtile, as the products take it."""
    tile, tile_q = s.tiles(chunk, block, again=s.held)
    left, inverse = s.left_operand(tile), chunk.inverse_temperature
    found = None if named is None else named.values(tile, block)
    s.kernels.grads(
        tile, chunk.target, block.span.start, block.shape, inverse, c, wants, left, tile_q, block.shape_q, s.p.jsd_beta
    )
    if named is not None and found is not None:
        named.picks.put(left, block, found)
    return left


class Named:
    """The gradient of a stored teacher's divergences. With g_o = dL/dlog p_o over its K + 1 outcomes, and G their sum:

    dL/dz_k = g_k - p_k G in a named column, p_v (g_r / p_r - G) in any other. The second goes into the coefficient of
    p, which the first does not share: where the policy is sure, 1 / p_r is so large that no correction of it would be
    left standing.
    """

    def __init__(
        self,
        s: Sweep,
        chunk: Chunk,
        stats: Mapping[str, Tensor],
        d: dict[str, Tensor],
        c: Tensor,
        other: AbstractSet[str],
    ):
        assert s.p.teacher is not None
        K, p = s.p.teacher.ids.shape[1], stats["outcomes"]
        g, ratio = topk.gradient(p, s.teacher_outcomes(chunk.rows), K, d, s.p.jsd_beta)
        total = g.sum(1)
        z = p[:, :K] + stats["lse"][:, None]
        self.picks = Picks(s.p.teacher.ids[chunk.rows], s)
        self.own = (g[:, :K] - p[:, :K].exp() * total[:, None]) * s.slope(z, chunk.inverse_temperature)
        self.s, self.chunk, self.other, self.before = s, chunk, other, c.clone()
        c[C_P] += ratio - total

    def values(self, tile: Tensor, block: Columns) -> Tensor:  # (R, K)
        """What the named columns are to hold: their own gradient and that of the other statistics, if any carries
        one."""
        if not self.other:
            return self.own
        column, _ = self.picks.where(block)
        out, inverse = torch.empty_like(tile), self.chunk.inverse_temperature
        self.s.kernels.grads(
            tile, self.chunk.target, block.span.start, block.shape, inverse, self.before, self.other, out
        )
        return self.own + out.gather(1, column)
