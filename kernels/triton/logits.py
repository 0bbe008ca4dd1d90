"""How raw products become logits: shared by the kernels of rows.py and forward.py.

The lines quoted above a stage are those of fastpost/core/rows.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # a banned logit, before scale and temperature
NOTHING = tl.constexpr(-1e38)  # one of a column that is not there, and a maximum over none


@triton.jit
def tanh(x):
    # 1 - 2 / (e^2x + 1) cancels near 0, where the series is exact to fp32.
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))))
    return tl.where(square < 0.01, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def logaddexp(a, b):
    high = tl.maximum(a, b)
    return high + tl.log(tl.exp(a - high) + tl.exp(b - high))


@triton.jit
def shaped(b_raw, p_bias, o_v, m_v, scale, softcap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr):
    # softcap * tanh(scale * (raw + bias) / softcap)
    if HAS_BIAS:
        b_raw = tl.maximum(b_raw + tl.load(p_bias + o_v, mask=m_v, other=0.0).to(b_raw.dtype), LOWEST)
    b_z = b_raw * scale
    if CAPPED:
        b_z = softcap * tanh(b_z / softcap)
    return b_z


@triton.jit
def loaded(p_tile, p_bias, o_v, m_v, scale, softcap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """Logits at temperature 1 of columns o_v of a tile."""
    b_raw = tl.load(p_tile + o_v, mask=m_v, other=0.0)
    return shaped(b_raw, p_bias, o_v, m_v, scale, softcap, HAS_BIAS, CAPPED)
