"""The row kernels on a GPU: what `fastpost.core.rows.TorchRows` does, one pass over the tile for each kernel.

  fold     one program a row: maxima and sums, then (frozen schedule) e^(z - max) in the operands' dtype
  mixture  one program a row: KL(p || m) and KL(q || m)
  grads    one program a row and block of columns: dL/dtile, elementwise

Each reads a logit once, 16 bytes at a time, and writes at most one number for it, so memory bandwidth is their floor. A
fold keeps its row of the tile in registers from the load to the last write; only a tile wider than BV columns is read
again. Nothing is split over the columns of a row: 8192 of them are 32 KB, which one multiprocessor reads from L2 in a
third of a microsecond, and a second launch, to put parts together, costs several.

Tiles are fp32; every sum is fp32. The lines quoted above a stage are those of fastpost/core/rows.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from fastpost.kernels import sums
from fastpost.kernels.launch import ROWS, Row
from fastpost.kernels.logits import NOTHING, loaded, logaddexp
from torch import Tensor

import triton
import triton.language as tl

# The rows of the coefficients: the same places as in fastpost/core/rows.py.
C_TARGET, C_P, C_PLOGP, C_APART_Q, C_Q, C_PSQ, C_ONE, C_APART_M, C_AT_1 = map(tl.constexpr, range(9))
C_MAX, C_LOG_SUM, C_MAX_Q, C_LOG_SUM_Q, C_MAX_1, C_LOG_SUM_1, C_LOG_SUM_SQ = map(tl.constexpr, range(9, 16))

# Numbers that change from call to call, and on which no access depends: a kernel for each would be one too many.
VARYING = ("R", "start")


@triton.jit
def _left(b_at_1, b_z, b_max, is_target, softcap, CAPPED: tl.constexpr):
    # out = e * (1 - (at_1 / softcap)^2); 0 in the target's own column
    b_e = tl.exp(b_z - b_max[:, None])
    if CAPPED:
        b_e = b_e * (1.0 - (b_at_1 / softcap) * (b_at_1 / softcap))
    return tl.where(is_target, 0.0, b_e)


@triton.jit(do_not_specialize=VARYING)
def _fold_kernel(
    state, tile, tile_q, out, target, bias, bias_q, inverse_temperature,
    R, B, start, tile_stride, tile_q_stride, out_stride, scale, softcap, scale_q, softcap_q,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr,
    DENSE: tl.constexpr, HAS_BIAS_Q: tl.constexpr, CAPPED_Q: tl.constexpr, SLOTS: tl.constexpr,
    WRITE: tl.constexpr, ONCE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    p_tile, p_tile_q, p_out = tile + i_r * tile_stride, tile_q + i_r * tile_q_stride, out + i_r * out_stride
    p_state = state + i_r + tl.arange(0, 1)
    s = sums.load(p_state, R, True, 1, SLOTS)
    b_inverse = 1.0
    if TEMPERED:
        b_inverse = tl.load(inverse_temperature + i_r)

    # state[TARGET] = where(here, at_1.gather(column), state[TARGET])
    column = tl.load(target + i_r) - start
    here = (column >= 0) & (column < B)
    b_found = loaded(p_tile, bias, column, here, scale, softcap, HAS_BIAS, CAPPED)
    b_target = tl.where(here, b_found, s[sums.TARGET])

    for v in range(0, BV if ONCE else B, BV):
        o_v = v + tl.arange(0, BV)[None, :]
        m_v = o_v < B
        b_at_1 = tl.where(m_v, loaded(p_tile, bias, o_v, m_v, scale, softcap, HAS_BIAS, CAPPED), NOTHING)
        b_z, b_zq = tl.where(m_v, b_at_1 * b_inverse, NOTHING), b_at_1
        if DENSE:
            b_zq = loaded(p_tile_q, bias_q, o_v, m_v, scale_q, softcap_q, HAS_BIAS_Q, CAPPED_Q)
            b_zq = tl.where(m_v, b_zq * b_inverse, NOTHING)
        s = sums.folded(s, b_target, b_at_1, b_z, b_zq, m_v, SLOTS)
        if WRITE and ONCE:
            b_left = _left(b_at_1, b_z, s[sums.MAX], o_v == column, softcap, CAPPED)
            tl.store(p_out + o_v, b_left.to(out.dtype.element_ty), mask=m_v)
    sums.store(p_state, R, True, s, SLOTS)

    # A wider tile's maximum is known only at its end: its columns are read a second time.
    if WRITE and not ONCE:
        for v in range(0, B, BV):
            o_v = v + tl.arange(0, BV)[None, :]
            m_v = o_v < B
            b_at_1 = loaded(p_tile, bias, o_v, m_v, scale, softcap, HAS_BIAS, CAPPED)
            b_left = _left(b_at_1, b_at_1 * b_inverse, s[sums.MAX], o_v == column, softcap, CAPPED)
            tl.store(p_out + o_v, b_left.to(out.dtype.element_ty), mask=m_v)


@triton.jit(do_not_specialize=VARYING)
def _mixture_kernel(
    state, tile, tile_q, bias, bias_q, inverse_temperature,
    R, B, tile_stride, tile_q_stride, scale, softcap, scale_q, softcap_q, log_beta, log_other,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr,
    HAS_BIAS_Q: tl.constexpr, CAPPED_Q: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    p_tile, p_tile_q = tile + i_r * tile_stride, tile_q + i_r * tile_q_stride
    p_state = state + i_r
    b_max, b_log_sum = tl.load(p_state + sums.MAX * R), tl.log(tl.load(p_state + sums.SUM * R))
    b_max_q, b_log_sum_q = tl.load(p_state + sums.MAX_Q * R), tl.log(tl.load(p_state + sums.SUM_Q * R))
    b_inverse = 1.0
    if TEMPERED:
        b_inverse = tl.load(inverse_temperature + i_r)
    b_p_m, b_q_m = tl.load(p_state + sums.P_M * R), tl.load(p_state + sums.Q_M * R)
    for v in range(0, B, BV):
        o_v = v + tl.arange(0, BV)
        m_v = o_v < B
        b_logp = loaded(p_tile, bias, o_v, m_v, scale, softcap, HAS_BIAS, CAPPED) * b_inverse - b_max - b_log_sum
        b_logq = loaded(p_tile_q, bias_q, o_v, m_v, scale_q, softcap_q, HAS_BIAS_Q, CAPPED_Q) * b_inverse
        b_logq = b_logq - b_max_q - b_log_sum_q
        b_logm = logaddexp(b_logp + log_other, b_logq + log_beta)
        # state[P_M] += (p * (logp - logm)).sum(1); state[Q_M] += (q * (logq - logm)).sum(1)
        b_p_m += tl.sum(tl.where(m_v, tl.exp(b_logp) * (b_logp - b_logm), 0.0))
        b_q_m += tl.sum(tl.where(m_v, tl.exp(b_logq) * (b_logq - b_logm), 0.0))
    tl.store(p_state + sums.P_M * R, b_p_m)
    tl.store(p_state + sums.Q_M * R, b_q_m)


@triton.jit(do_not_specialize=VARYING)
def _grads_kernel(
    tile, tile_q, out, target, bias, bias_q, inverse_temperature, c,
    R, B, start, tile_stride, tile_q_stride, out_stride, scale, softcap, scale_q, softcap_q, log_beta, log_other,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr,
    DENSE: tl.constexpr, HAS_BIAS_Q: tl.constexpr, CAPPED_Q: tl.constexpr,
    WANT_Z: tl.constexpr, WANT_SQ: tl.constexpr, WANT_ONE: tl.constexpr, WANT_AT_1: tl.constexpr,
    REVERSE: tl.constexpr, FORWARD: tl.constexpr, JSD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    p_c = c + i_r
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_v = o_v < B
    b_inverse = 1.0
    if TEMPERED:
        b_inverse = tl.load(inverse_temperature + i_r)
    b_at_1 = loaded(tile + i_r * tile_stride, bias, o_v, m_v, scale, softcap, HAS_BIAS, CAPPED)
    b_logp = b_at_1 * b_inverse - tl.load(p_c + C_MAX * R) - tl.load(p_c + C_LOG_SUM * R)
    b_p = tl.exp(b_logp)
    # d = p * c[P] + p log p * c[PLOGP] + p^2 / sum p^2 * c[PSQ]
    b_factor = tl.load(p_c + C_P * R) + tl.zeros_like(b_p)
    if WANT_Z:
        b_factor += b_logp * tl.load(p_c + C_PLOGP * R)
    if DENSE:
        b_logq = loaded(tile_q + i_r * tile_q_stride, bias_q, o_v, m_v, scale_q, softcap_q, HAS_BIAS_Q, CAPPED_Q)
        b_logq = b_logq * b_inverse - tl.load(p_c + C_MAX_Q * R) - tl.load(p_c + C_LOG_SUM_Q * R)
        # + p (log p - log q) * c[APART_Q] + p (log p - log m) * c[APART_M]
        if REVERSE:
            b_factor += (b_logp - b_logq) * tl.load(p_c + C_APART_Q * R)
        if JSD:
            b_logm = logaddexp(b_logp + log_other, b_logq + log_beta)
            b_factor += (b_logp - b_logm) * tl.load(p_c + C_APART_M * R)
    b_d = b_p * b_factor
    # + q * c[Q]
    if DENSE and FORWARD:
        b_d += tl.exp(b_logq) * tl.load(p_c + C_Q * R)
    if WANT_SQ:
        b_d += tl.exp(2.0 * b_logp - tl.load(p_c + C_LOG_SUM_SQ * R)) * tl.load(p_c + C_PSQ * R)
    # + c[ONE] + 1_y * c[TARGET]
    if WANT_ONE:
        b_d += tl.load(p_c + C_ONE * R)
    b_here = o_v == tl.load(target + i_r) - start
    b_d += tl.where(b_here, tl.load(p_c + C_TARGET * R), 0.0)
    b_d = b_d * b_inverse
    # d -= softmax(at_1) * c[AT_1]; d += 1_y * c[AT_1]
    if WANT_AT_1:
        b_c = tl.load(p_c + C_AT_1 * R)
        b_p_at_1 = tl.exp(b_at_1 - tl.load(p_c + C_MAX_1 * R) - tl.load(p_c + C_LOG_SUM_1 * R))
        b_d += tl.where(b_here, b_c, 0.0) - b_p_at_1 * b_c
    if CAPPED:
        b_d = b_d * (1.0 - (b_at_1 / softcap) * (b_at_1 / softcap))
    tl.store(out + i_r * out_stride + o_v, (b_d * scale).to(out.dtype.element_ty), mask=m_v)


class TritonRows:
    """`fold`, `mixture` and `grads` of fastpost.core.rows.TorchRows, with its arguments. Tiles are fp32 with unit
    column stride."""

    def __init__(self, table: Mapping[str, Row] = ROWS):
        self._table = table

    def fold(
        self,
        state: Tensor,  # (14, R)
        tile: Tensor,  # (R, B)
        target: Tensor,  # (R,)
        start: int,
        shape: tuple[Tensor | None, float, float | None],  # bias, scale, softcap
        inverse_temperature: Tensor | None,  # (R,)
        wants: AbstractSet[str],
        tile_q: Tensor | None = None,  # (R, B)
        shape_q: tuple[Tensor | None, float, float | None] | None = None,
        out: Tensor | None = None,  # (R, B)
    ) -> None:
        (bias, scale, softcap), (bias_q, scale_q, softcap_q) = shape, shape_q or (None, 1.0, None)
        q, o, launch = _or(tile_q, tile), _or(out, tile), _launch(self._table["fold"], tile.shape[1])
        _fold_kernel[(tile.shape[0],)](
            state, tile, q, o, target, _or(bias, tile), _or(bias_q, tile), _or(inverse_temperature, tile),
            *tile.shape, start, tile.stride(0), q.stride(0), o.stride(0),
            scale, softcap or 1.0, scale_q, softcap_q or 1.0,
            HAS_BIAS=bias is not None, CAPPED=softcap is not None, TEMPERED=inverse_temperature is not None,
            DENSE=tile_q is not None, HAS_BIAS_Q=bias_q is not None, CAPPED_Q=softcap_q is not None,
            SLOTS=sums.slots(wants, tile_q is not None), WRITE=out is not None,
            ONCE=tile.shape[1] <= launch["BV"], **launch,
        )  # fmt: skip

    def mixture(
        self,
        state: Tensor,  # (14, R)
        tile: Tensor,  # (R, B)
        shape: tuple[Tensor | None, float, float | None],
        inverse_temperature: Tensor | None,  # (R,)
        tile_q: Tensor,  # (R, B)
        shape_q: tuple[Tensor | None, float, float | None],
        beta: float,
    ) -> None:
        (bias, scale, softcap), (bias_q, scale_q, softcap_q) = shape, shape_q
        _mixture_kernel[(tile.shape[0],)](
            state, tile, tile_q, _or(bias, tile), _or(bias_q, tile), _or(inverse_temperature, tile),
            *tile.shape, tile.stride(0), tile_q.stride(0), scale, softcap or 1.0, scale_q, softcap_q or 1.0,
            math.log(beta), math.log1p(-beta),
            HAS_BIAS=bias is not None, CAPPED=softcap is not None, TEMPERED=inverse_temperature is not None,
            HAS_BIAS_Q=bias_q is not None, CAPPED_Q=softcap_q is not None,
            **_launch(self._table["mixture"], tile.shape[1]),
        )  # fmt: skip

    def grads(
        self,
        tile: Tensor,  # (R, B)
        target: Tensor,  # (R,)
        start: int,
        shape: tuple[Tensor | None, float, float | None],
        inverse_temperature: Tensor | None,  # (R,)
        c: Tensor,  # (16, R)
        wants: AbstractSet[str],
        out: Tensor,  # (R, B), may be the tile
        tile_q: Tensor | None = None,  # (R, B)
        shape_q: tuple[Tensor | None, float, float | None] | None = None,
        beta: float = 0.5,
    ) -> None:
        (bias, scale, softcap), (bias_q, scale_q, softcap_q) = shape, shape_q or (None, 1.0, None)
        q, launch = _or(tile_q, tile), _launch(self._table["grads"], tile.shape[1])
        jsd = "jsd" in wants
        _grads_kernel[(tile.shape[0], triton.cdiv(tile.shape[1], launch["BV"]))](
            tile, q, out, target, _or(bias, tile), _or(bias_q, tile), _or(inverse_temperature, tile), c,
            *tile.shape, start, tile.stride(0), q.stride(0), out.stride(0),
            scale, softcap or 1.0, scale_q, softcap_q or 1.0,
            math.log(beta) if jsd else 0.0, math.log1p(-beta) if jsd else 0.0,
            HAS_BIAS=bias is not None, CAPPED=softcap is not None, TEMPERED=inverse_temperature is not None,
            DENSE=tile_q is not None, HAS_BIAS_Q=bias_q is not None, CAPPED_Q=softcap_q is not None,
            WANT_Z="entropy" in wants, WANT_SQ="log_sum_sq" in wants,
            WANT_ONE="mean_logp" in wants, WANT_AT_1="logp@1" in wants,
            REVERSE="reverse_kl" in wants, FORWARD="forward_kl" in wants, JSD=jsd,
            **launch,
        )  # fmt: skip


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A pointer must point somewhere, also where the kernel is compiled not to follow it."""
    return other if x is None else x


def _launch(entry: Row, columns: int) -> dict[str, int | bool]:
    """The table's entry, with no more columns than there are."""
    columns = min(entry.BV, max(16, triton.next_power_of_2(columns)))
    return {"BV": columns, "num_warps": entry.num_warps, "enable_fp_fusion": True}
