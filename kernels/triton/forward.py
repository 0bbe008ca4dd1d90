"""The statistics of the head without its logits: a matrix product whose epilogue folds each tile where it was made.

A program owns a block of rows and a part of the vocabulary. For each tile of it: acc = hidden @ weight.T over D, then
the same sums as `fold` (sums.py), on the accumulators. What it leaves is the state over its part; `_merge_kernel` adds
the parts in order, so two runs give the same bits. Memory moved: the weight once for every GROUP row blocks, hidden
once for each tile (both from L2), and 4 bytes a row, part and sum. No logit is written.

What it does not do: the JSD, whose integrand needs the finished logsumexps; a LoRA on the head; a stored teacher.
Not yet timed on a GPU: nothing in the library calls it before `benchmarks/rows.py` has shown that it wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

import torch
from fastpost.kernels import sums
from fastpost.kernels.launch import COPY_ENGINE, FORWARD, Product, architecture
from fastpost.kernels.logits import NOTHING, shaped
from torch import Tensor

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

SUPPORTED = {"logp", "top1", *sums.OF_STATISTIC}
PLAIN = {"entropy", "log_sum_sq"}  # what needs no more registers than the accumulators leave
MOST_PARTS = 64
BR = 128  # rows of a program that merges
VARYING = ("R", "V", "blocks", "tiles_each")


@triton.jit
def _block(x, stride, start, rows, k, D, N: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr):
    """x[start : start + N, k : k + BK]; rows past the last are some other row's or zero, and masked later."""
    if TMA:
        b_x = x.load([start, k])
    else:
        o_n, o_k = tl.minimum(start + tl.arange(0, N), rows - 1), k + tl.arange(0, BK)
        p_x = x + o_n[:, None].to(tl.int64) * stride + o_k[None, :]
        b_x = tl.load(p_x) if EVEN else tl.load(p_x, mask=o_k[None, :] < D, other=0.0)
    return b_x


@triton.jit
def _product(
    hidden, weight, hidden_stride, weight_stride, i_m, i_v, R, V, D,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """hidden @ weight.T of one tile, accumulated in fp32."""
    b_acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, D, BK):
        b_h = _block(hidden, hidden_stride, i_m * BM, R, k, D, BM, BK, TMA, EVEN)
        b_w = _block(weight, weight_stride, i_v * BN, V, k, D, BN, BK, TMA, EVEN)
        b_acc = tl.dot(b_h, b_w.T, b_acc, input_precision="ieee")
    return b_acc


@triton.jit
def _place(i, blocks, parts, GROUP: tl.constexpr):
    """Program i -> (row block, part): row blocks fastest, within groups of GROUP that share what L2 holds."""
    first = i // (GROUP * parts) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    rest = i % (GROUP * parts)
    return first + rest % size, rest // size


@triton.jit(do_not_specialize=VARYING)
def _forward_kernel(
    parts, hidden, weight, hidden_q, weight_q, target, bias, bias_q, inverse_temperature,
    R, V, D, D_q, hidden_stride, weight_stride, hidden_q_stride, weight_q_stride, blocks, tiles_each,
    scale, softcap, scale_q, softcap_q,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr,
    DENSE: tl.constexpr, HAS_BIAS_Q: tl.constexpr, CAPPED_Q: tl.constexpr, SLOTS: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(V, BN)
    i_m, i_p = _place(tl.program_id(0), blocks, tl.cdiv(tiles, tiles_each), GROUP)
    o_r = i_m * BM + tl.arange(0, BM)
    m_r = o_r < R
    b_column = tl.load(target + o_r, mask=m_r, other=-1).to(tl.int32)
    b_inverse = tl.full([BM, 1], 1.0, tl.float32)
    if TEMPERED:
        b_inverse = tl.load(inverse_temperature + o_r, mask=m_r, other=1.0)[:, None]
    s = sums.nothing(BM)
    for i_v in range(i_p * tiles_each, tl.minimum((i_p + 1) * tiles_each, tiles)):
        o_v = i_v * BN + tl.arange(0, BN)[None, :]
        m_v = o_v < V
        b_acc = _product(hidden, weight, hidden_stride, weight_stride, i_m, i_v, R, V, D, BM, BN, BK, TMA, EVEN)
        b_at_1 = tl.where(m_v, shaped(b_acc, bias, o_v, m_v, scale, softcap, HAS_BIAS, CAPPED), NOTHING)
        # state[TARGET] = where(here, at_1.gather(column), state[TARGET])
        here = (b_column >= i_v * BN) & (b_column < i_v * BN + BN) & (b_column < V)
        b_found = tl.sum(tl.where(o_v == b_column[:, None], b_at_1, 0.0), 1)
        b_target = tl.where(here, b_found, s[sums.TARGET])
        b_z = tl.where(m_v, b_at_1 * b_inverse, NOTHING)
        b_zq = b_z
        if DENSE:
            b_zq = _product(
                hidden_q, weight_q, hidden_q_stride, weight_q_stride, i_m, i_v, R, V, D_q, BM, BN, BK, TMA, EVEN
            )
            b_zq = shaped(b_zq, bias_q, o_v, m_v, scale_q, softcap_q, HAS_BIAS_Q, CAPPED_Q) * b_inverse
            b_zq = tl.where(m_v, b_zq, NOTHING)
        s = sums.folded(s, b_target, b_at_1, b_z, b_zq, m_v, SLOTS)
    sums.store(parts + i_p.to(tl.int64) * sums.STATE_ROWS * R + o_r, R, m_r, s, SLOTS)


@triton.jit(do_not_specialize=("R", "P"))
def _merge_kernel(state, parts, R, P, SLOTS: tl.constexpr, BR: tl.constexpr):
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    m_r = o_r < R
    s = sums.nothing(BR)
    for i_p in range(0, P):
        t = sums.load(parts + tl.cast(i_p, tl.int64) * sums.STATE_ROWS * R + o_r, R, m_r, BR, SLOTS)
        s = sums.added(s, t)
    sums.store(state + o_r, R, m_r, s, SLOTS)
    sums.store(state + o_r, R, m_r, sums.nothing(BR), sums.ALL - SLOTS)
    for slot in tl.static_range(sums.CARRIED, sums.STATE_ROWS):
        tl.store(state + slot * R + o_r, tl.zeros([BR], tl.float32), mask=m_r)


class Logits(NamedTuple):
    """What logits are made of: softcap(scale * (hidden @ weight.T + bias))."""

    hidden: Tensor  # (R, D)
    weight: Tensor  # (V, D), of hidden's dtype
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class TritonForward:
    """The state that folding every tile leaves, in two launches."""

    entries: Mapping[str, Product]  # of launch.FORWARD
    tma: bool  # whether the GPU has an engine that copies tiles
    processors: int

    def takes(self, wants: AbstractSet[str], dense: bool) -> bool:
        """Whether it finds these statistics, with a reference (dense) or without."""
        return wants <= SUPPORTED and ("two" in self.entries or not (dense or "logp@1" in wants))

    def state(
        self,
        policy: Logits,
        target: Tensor,  # (R,)
        inverse_temperature: Tensor | None,  # (R,)
        wants: AbstractSet[str],
        reference: Logits | None = None,  # of R rows and V columns too; its D may differ
    ) -> Tensor:  # (STATE_ROWS, R)
        assert self.takes(wants, reference is not None), wants
        p, q = policy, reference or policy
        R, V, slots = len(p.hidden), len(p.weight), sums.slots(wants, reference is not None)
        matrices = given = (p.hidden, p.weight, q.hidden, q.weight)
        assert all(x.stride(1) == 1 and x.dtype == p.hidden.dtype for x in matrices), "contiguous rows, of one dtype"
        tma = self.tma and all(_copied(x) for x in matrices)
        shaped = p.bias is not None or p.softcap is not None or (self.tma and not tma)
        entry = self.entries[_kind(p.hidden.dtype, slots, shaped)]
        blocks, tiles = triton.cdiv(R, entry.BM), triton.cdiv(V, entry.BN)
        tiles_each = share(blocks, tiles, self.processors)
        P = triton.cdiv(tiles, tiles_each)
        parts = torch.empty(P, sums.STATE_ROWS.value, R, device=target.device)
        state = torch.empty(sums.STATE_ROWS.value, R, device=target.device)
        if R == 0:
            return state
        if tma:
            blocks_of = ([entry.BM, entry.BK], [entry.BN, entry.BK]) * 2
            given = [TensorDescriptor.from_tensor(x, size) for x, size in zip(matrices, blocks_of, strict=True)]
        _forward_kernel[(blocks * P,)](
            parts, *given, target, _or(p.bias, parts), _or(q.bias, parts),
            _or(inverse_temperature, parts), R, V, p.hidden.shape[1], q.hidden.shape[1],
            *(x.stride(0) for x in matrices), blocks, tiles_each,
            p.scale, p.softcap or 1.0, q.scale, q.softcap or 1.0,
            HAS_BIAS=p.bias is not None, CAPPED=p.softcap is not None, TEMPERED=inverse_temperature is not None,
            DENSE=reference is not None, HAS_BIAS_Q=q.bias is not None, CAPPED_Q=q.softcap is not None, SLOTS=slots,
            TMA=tma, EVEN=all(x.shape[1] % entry.BK == 0 for x in matrices), enable_fp_fusion=True,
            **entry._asdict(),
        )  # fmt: skip
        _merge_kernel[(triton.cdiv(R, BR),)](state, parts, R, P, SLOTS=slots, BR=BR, num_warps=4, enable_fp_fusion=True)
        return state


def share(blocks: int, tiles: int, processors: int) -> int:
    """Tiles of a program: the fewest in a row on the busiest processor, then the fewest parts."""

    def busiest(tiles_each: int) -> int:
        return triton.cdiv(blocks * triton.cdiv(tiles, tiles_each), processors) * tiles_each

    return min((triton.cdiv(tiles, parts) for parts in range(1, min(MOST_PARTS, tiles) + 1)), key=busiest)


def _kind(dtype: torch.dtype, slots: int, shaped: bool) -> str:
    """The entry of a table for what a program has to hold."""
    if dtype == torch.float32:
        return "fp32"
    if sums.has(slots, sums.MAX_Q.value) or sums.has(slots, sums.MAX_1.value):
        return "two"
    return "one" if shaped or slots & ~sums.slots(PLAIN, False) else "plain"


def _copied(x: Tensor) -> bool:
    """Whether the copy engine takes it."""
    return x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A pointer must point somewhere, also where the kernel is compiled not to follow it."""
    return other if x is None else x


def forward_on(device: torch.device) -> TritonForward:
    """The forward with the launches of a GPU."""
    name = architecture(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return TritonForward(FORWARD[name], name in COPY_ENGINE, processors)
