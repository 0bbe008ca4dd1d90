"""The row kernels on a GPU: what `fastpost.rows.TorchRows` does, one pass over the tile for each kernel.

  fold     one program a row walks its columns: online maxima and sums, then (frozen schedule) e^(z - max) in the
           operands' dtype
  mixture  one program a row: KL(p || m) and KL(q || m)
  grads    one program a row and block of columns: dL/dtile, elementwise

All three read each logit once or twice and write at most one number for it, so memory bandwidth is their floor. Tiles
are fp32; every sum is fp32. The lines quoted above a stage are those of fastpost/rows.py.
"""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet

from torch import Tensor

import triton
import triton.language as tl

# The same places as in fastpost/rows.py; a test compares them.
MAX, SUM, TARGET, SUM_Z, SUM_SQ, TOTAL, MAX_Q, SUM_Q, APART_P, APART_Q, MAX_1, SUM_1, P_M, Q_M = map(
    tl.constexpr, range(14)
)
C_TARGET, C_P, C_PLOGP, C_APART_Q, C_Q, C_PSQ, C_ONE, C_APART_M, C_AT_1 = map(tl.constexpr, range(9))
C_MAX, C_LOG_SUM, C_MAX_Q, C_LOG_SUM_Q, C_MAX_1, C_LOG_SUM_1, C_LOG_SUM_SQ = map(tl.constexpr, range(9, 16))
LOWEST = tl.constexpr(-1e30)

# Columns a program takes at a time, and warps: without a spill on sm_80, sm_89, sm_90, sm_100 and gfx942
# (tests/test_triton_compile.py).
# Not yet timed on a GPU.
LAUNCH = {
    "fold": {"BV": 4096, "num_warps": 8},
    "mixture": {"BV": 2048, "num_warps": 8},
    "grads": {"BV": 2048, "num_warps": 8},
}


@triton.jit
def _tanh(x):
    # 1 - 2 / (e^2x + 1) cancels near 0, where the series is exact to fp32.
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))))
    return tl.where(square < 0.01, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _logaddexp(a, b):
    high = tl.maximum(a, b)
    return high + tl.log(tl.exp(a - high) + tl.exp(b - high))


@triton.jit
def _logits(p_tile, p_bias, o_v, m_v, scale, softcap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr):
    # shaped(raw, shape): softcap * tanh(scale * (raw + bias) / softcap)
    b_z = tl.load(p_tile + o_v, mask=m_v, other=0.0)
    if HAS_BIAS:
        b_z = tl.maximum(b_z + tl.load(p_bias + o_v, mask=m_v, other=0.0).to(b_z.dtype), LOWEST)
    b_z = b_z * scale
    if CAPPED:
        b_z = softcap * _tanh(b_z / softcap)
    return b_z


@triton.jit
def _fold_kernel(
    state, tile, tile_q, out, target, bias, bias_q, inverse_temperature,
    R, B, start, tile_stride, tile_q_stride, out_stride, scale, softcap, scale_q, softcap_q,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr,
    DENSE: tl.constexpr, HAS_BIAS_Q: tl.constexpr, CAPPED_Q: tl.constexpr,
    WANT_Z: tl.constexpr, WANT_SQ: tl.constexpr, WANT_TOTAL: tl.constexpr, WANT_AT_1: tl.constexpr,
    REVERSE: tl.constexpr, FORWARD: tl.constexpr, WRITE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    p_state, p_tile, p_tile_q = state + i_r, tile + i_r * tile_stride, tile_q + i_r * tile_q_stride
    b_max, b_sum = tl.load(p_state + MAX * R), tl.load(p_state + SUM * R)
    b_sum_z, b_sum_sq, b_total = (
        tl.load(p_state + SUM_Z * R),
        tl.load(p_state + SUM_SQ * R),
        tl.load(p_state + TOTAL * R),
    )
    b_max_q, b_sum_q = tl.load(p_state + MAX_Q * R), tl.load(p_state + SUM_Q * R)
    b_apart_p, b_apart_q = tl.load(p_state + APART_P * R), tl.load(p_state + APART_Q * R)
    b_max_1, b_sum_1 = tl.load(p_state + MAX_1 * R), tl.load(p_state + SUM_1 * R)
    b_inverse = 1.0
    if TEMPERED:
        b_inverse = tl.load(inverse_temperature + i_r)

    # state[TARGET] = where(here, at_1.gather(column), state[TARGET])
    column = tl.load(target + i_r) - start
    if (column >= 0) & (column < B):
        b_at_1 = _logits(p_tile, bias, column, True, scale, softcap, HAS_BIAS, CAPPED)
        tl.store(p_state + TARGET * R, b_at_1)

    for v in range(0, B, BV):
        o_v = v + tl.arange(0, BV)
        m_v = o_v < B
        b_at_1 = tl.where(m_v, _logits(p_tile, bias, o_v, m_v, scale, softcap, HAS_BIAS, CAPPED), LOWEST)
        b_z = tl.where(m_v, b_at_1 * b_inverse, LOWEST)
        if WANT_TOTAL:
            b_total += tl.sum(tl.where(m_v, b_z, 0.0))
        if WANT_AT_1:
            b_new = tl.maximum(b_max_1, tl.max(b_at_1))
            b_sum_1 = b_sum_1 * tl.exp(b_max_1 - b_new) + tl.sum(tl.exp(b_at_1 - b_new))
            b_max_1 = b_new
        # shift, decay = max - new max, e^shift
        b_new = tl.maximum(b_max, tl.max(b_z))
        shift = b_max - b_new
        decay = tl.exp(shift)
        b_max = b_new
        b_x = b_z - b_max
        b_e = tl.exp(b_x)
        # state[SUM_Z] = (state[SUM_Z] + shift * state[SUM]) * decay + (e * x).sum(1)
        if WANT_Z:
            b_sum_z = (b_sum_z + shift * b_sum) * decay + tl.sum(b_e * b_x)
        if WANT_SQ:
            b_sum_sq = b_sum_sq * decay * decay + tl.sum(b_e * b_e)
        if DENSE:
            b_zq = _logits(p_tile_q, bias_q, o_v, m_v, scale_q, softcap_q, HAS_BIAS_Q, CAPPED_Q)
            b_zq = tl.where(m_v, b_zq * b_inverse, LOWEST)
            b_new_q = tl.maximum(b_max_q, tl.max(b_zq))
            shift_q = b_max_q - b_new_q
            decay_q = tl.exp(shift_q)
            b_max_q = b_new_q
            b_xq = b_zq - b_max_q
            b_eq = tl.exp(b_xq)
            # state[APART_P] = (state[APART_P] + (shift - shift_q) * state[SUM]) * decay + (e * (x - xq)).sum(1)
            if REVERSE:
                b_apart_p = (b_apart_p + (shift - shift_q) * b_sum) * decay + tl.sum(b_e * (b_x - b_xq))
            # state[APART_Q] = (state[APART_Q] + (shift_q - shift) * state[SUM_Q]) * decay_q + (eq * (xq - x)).sum(1)
            if FORWARD:
                b_apart_q = (b_apart_q + (shift_q - shift) * b_sum_q) * decay_q + tl.sum(b_eq * (b_xq - b_x))
            b_sum_q = b_sum_q * decay_q + tl.sum(b_eq)
        b_sum = b_sum * decay + tl.sum(b_e)

    tl.store(p_state + MAX * R, b_max)
    tl.store(p_state + SUM * R, b_sum)
    if WANT_Z:
        tl.store(p_state + SUM_Z * R, b_sum_z)
    if WANT_SQ:
        tl.store(p_state + SUM_SQ * R, b_sum_sq)
    if WANT_TOTAL:
        tl.store(p_state + TOTAL * R, b_total)
    if WANT_AT_1:
        tl.store(p_state + MAX_1 * R, b_max_1)
        tl.store(p_state + SUM_1 * R, b_sum_1)
    if DENSE:
        tl.store(p_state + MAX_Q * R, b_max_q)
        tl.store(p_state + SUM_Q * R, b_sum_q)
        if REVERSE:
            tl.store(p_state + APART_P * R, b_apart_p)
        if FORWARD:
            tl.store(p_state + APART_Q * R, b_apart_q)

    # out = e * (1 - (at_1 / softcap)^2), at the maximum that all of the tile agrees on; 0 in the target's own column
    if WRITE:
        p_out = out + i_r * out_stride
        for v in range(0, B, BV):
            o_v = v + tl.arange(0, BV)
            m_v = o_v < B
            b_at_1 = _logits(p_tile, bias, o_v, m_v, scale, softcap, HAS_BIAS, CAPPED)
            b_e = tl.exp(b_at_1 * b_inverse - b_max)
            if CAPPED:
                b_e = b_e * (1.0 - (b_at_1 / softcap) * (b_at_1 / softcap))
            b_e = tl.where(o_v == column, 0.0, b_e)
            tl.store(p_out + o_v, b_e.to(out.dtype.element_ty), mask=m_v)


@triton.jit
def _mixture_kernel(
    state, tile, tile_q, bias, bias_q, inverse_temperature,
    R, B, tile_stride, tile_q_stride, scale, softcap, scale_q, softcap_q, log_beta, log_other,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr,
    HAS_BIAS_Q: tl.constexpr, CAPPED_Q: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    p_tile, p_tile_q = tile + i_r * tile_stride, tile_q + i_r * tile_q_stride
    p_state = state + i_r
    b_max, b_log_sum = tl.load(p_state + MAX * R), tl.log(tl.load(p_state + SUM * R))
    b_max_q, b_log_sum_q = tl.load(p_state + MAX_Q * R), tl.log(tl.load(p_state + SUM_Q * R))
    b_inverse = 1.0
    if TEMPERED:
        b_inverse = tl.load(inverse_temperature + i_r)
    b_p_m, b_q_m = tl.load(p_state + P_M * R), tl.load(p_state + Q_M * R)
    for v in range(0, B, BV):
        o_v = v + tl.arange(0, BV)
        m_v = o_v < B
        b_logp = _logits(p_tile, bias, o_v, m_v, scale, softcap, HAS_BIAS, CAPPED) * b_inverse - b_max - b_log_sum
        b_logq = _logits(p_tile_q, bias_q, o_v, m_v, scale_q, softcap_q, HAS_BIAS_Q, CAPPED_Q) * b_inverse
        b_logq = b_logq - b_max_q - b_log_sum_q
        b_logm = _logaddexp(b_logp + log_other, b_logq + log_beta)
        # state[P_M] += (p * (logp - logm)).sum(1); state[Q_M] += (q * (logq - logm)).sum(1)
        b_p_m += tl.sum(tl.where(m_v, tl.exp(b_logp) * (b_logp - b_logm), 0.0))
        b_q_m += tl.sum(tl.where(m_v, tl.exp(b_logq) * (b_logq - b_logm), 0.0))
    tl.store(p_state + P_M * R, b_p_m)
    tl.store(p_state + Q_M * R, b_q_m)


@triton.jit
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
    b_at_1 = _logits(tile + i_r * tile_stride, bias, o_v, m_v, scale, softcap, HAS_BIAS, CAPPED)
    b_logp = b_at_1 * b_inverse - tl.load(p_c + C_MAX * R) - tl.load(p_c + C_LOG_SUM * R)
    b_p = tl.exp(b_logp)
    # d = p * c[P] + p log p * c[PLOGP] + p^2 / sum p^2 * c[PSQ]
    b_factor = tl.load(p_c + C_P * R) + tl.zeros_like(b_p)
    if WANT_Z:
        b_factor += b_logp * tl.load(p_c + C_PLOGP * R)
    if DENSE:
        b_logq = _logits(tile_q + i_r * tile_q_stride, bias_q, o_v, m_v, scale_q, softcap_q, HAS_BIAS_Q, CAPPED_Q)
        b_logq = b_logq * b_inverse - tl.load(p_c + C_MAX_Q * R) - tl.load(p_c + C_LOG_SUM_Q * R)
        # + p (log p - log q) * c[APART_Q] + p (log p - log m) * c[APART_M]
        if REVERSE:
            b_factor += (b_logp - b_logq) * tl.load(p_c + C_APART_Q * R)
        if JSD:
            b_logm = _logaddexp(b_logp + log_other, b_logq + log_beta)
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
    """`fold`, `mixture` and `grads` of fastpost.rows.TorchRows, with its arguments. Tiles are fp32 with unit column
    stride."""

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
        q, o = tile if tile_q is None else tile_q, tile if out is None else out
        _fold_kernel[(tile.shape[0],)](
            state, tile, q, o, target, _or(bias, tile), _or(bias_q, tile), _or(inverse_temperature, tile),
            *tile.shape, start, tile.stride(0), q.stride(0), o.stride(0),
            scale, softcap or 1.0, scale_q, softcap_q or 1.0,
            HAS_BIAS=bias is not None, CAPPED=softcap is not None, TEMPERED=inverse_temperature is not None,
            DENSE=tile_q is not None, HAS_BIAS_Q=bias_q is not None, CAPPED_Q=softcap_q is not None,
            WANT_Z="entropy" in wants, WANT_SQ="log_sum_sq" in wants,
            WANT_TOTAL="mean_logp" in wants, WANT_AT_1="logp@1" in wants,
            REVERSE="reverse_kl" in wants, FORWARD="forward_kl" in wants, WRITE=out is not None,
            **_launch("fold", tile.shape[1]),
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
            **_launch("mixture", tile.shape[1]),
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
        q, launch = tile if tile_q is None else tile_q, _launch("grads", tile.shape[1])
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


def _launch(kernel: str, columns: int) -> dict[str, int]:
    """The table's entry, with no more columns than there are."""
    entry = LAUNCH[kernel]
    return {**entry, "BV": min(entry["BV"], max(16, triton.next_power_of_2(columns)))}
