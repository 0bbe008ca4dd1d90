"""The running sums of some rows, as kernels carry them: online softmax (arXiv:1805.02867), and its like for every
statistic.

`s` is a tuple of (rows,) vectors in the order of the state's slots, MAX to SUM_1. Sums are relative to the maxima, so
they can be moved to others; what two parts of a vocabulary found is added once both are at the same maxima. Bit i of
SLOTS says that slot i is wanted; what is not is carried as a constant, and the compiler drops it.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from fastpost.kernels.logits import NOTHING

import triton
import triton.language as tl

# The same places as in fastpost/core/rows.py; a test compares them.
MAX, SUM, TARGET, SUM_Z, SUM_SQ, TOTAL, MAX_Q, SUM_Q, APART_P, APART_Q, MAX_1, SUM_1, P_M, Q_M = map(
    tl.constexpr, range(14)
)
STATE_ROWS = tl.constexpr(14)
CARRIED = tl.constexpr(12)  # of them, by a fold
ALL = tl.constexpr((1 << 12) - 1)

# The slots that every call wants, and those of each statistic beyond them, by the names of `token_stats`.
ALWAYS = (MAX, SUM, TARGET)
OF_REFERENCE = (MAX_Q, SUM_Q)
OF_STATISTIC = {
    "entropy": (SUM_Z,),
    "log_sum_sq": (SUM_SQ,),
    "mean_logp": (TOTAL,),
    "logp@1": (MAX_1, SUM_1),
    "reverse_kl": (APART_P,),
    "forward_kl": (APART_Q,),
}


def slots(wants: AbstractSet[str], dense: bool) -> int:
    """SLOTS of a call."""
    found = [*ALWAYS, *(OF_REFERENCE if dense else ())]
    for name in wants & OF_STATISTIC.keys():
        found += OF_STATISTIC[name]
    return sum(1 << slot.value for slot in found)


@triton.constexpr_function
def has(slots, slot):
    return bool(slots >> slot & 1)


@triton.jit
def nothing(ROWS: tl.constexpr):
    """The sums over no column. A target that no column meets stays NaN, and says so."""
    zero = tl.zeros([ROWS], tl.float32)
    low, nan = zero + NOTHING, zero + float("nan")
    return (low, zero, nan, zero, zero, zero, low, zero, zero, zero, low, zero)


@triton.jit
def load(p_state, R, m_r, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    none, s = nothing(ROWS), ()
    for slot in tl.static_range(CARRIED):
        b_one = tl.load(p_state + slot * R, mask=m_r, other=0.0) if has(SLOTS, slot) else none[slot]
        s = s + (b_one,)  # noqa: RUF005  (a jitted tuple has no star)
    return s


@triton.jit
def store(p_state, R, m_r, s, SLOTS: tl.constexpr):
    for slot in tl.static_range(CARRIED):
        if has(SLOTS, slot):
            tl.store(p_state + slot * R, s[slot], mask=m_r)


@triton.jit
def moved(s, b_max, b_max_q, b_max_1):
    """The same sums, relative to other maxima."""
    shift, shift_q = s[MAX] - b_max, s[MAX_Q] - b_max_q
    decay, decay_q = tl.exp(shift), tl.exp(shift_q)
    return (
        b_max,
        s[SUM] * decay,
        s[TARGET],
        (s[SUM_Z] + shift * s[SUM]) * decay,
        s[SUM_SQ] * decay * decay,
        s[TOTAL],
        b_max_q,
        s[SUM_Q] * decay_q,
        (s[APART_P] + (shift - shift_q) * s[SUM]) * decay,
        (s[APART_Q] + (shift_q - shift) * s[SUM_Q]) * decay_q,
        b_max_1,
        s[SUM_1] * tl.exp(s[MAX_1] - b_max_1),
    )


@triton.jit
def added(s, t):
    """What two parts of the vocabulary found, together."""
    b_max, b_max_q = tl.maximum(s[MAX], t[MAX]), tl.maximum(s[MAX_Q], t[MAX_Q])
    b_max_1 = tl.maximum(s[MAX_1], t[MAX_1])
    s, t = moved(s, b_max, b_max_q, b_max_1), moved(t, b_max, b_max_q, b_max_1)
    return (
        b_max,
        s[SUM] + t[SUM],
        tl.where(t[TARGET] == t[TARGET], t[TARGET], s[TARGET]),
        s[SUM_Z] + t[SUM_Z],
        s[SUM_SQ] + t[SUM_SQ],
        s[TOTAL] + t[TOTAL],
        b_max_q,
        s[SUM_Q] + t[SUM_Q],
        s[APART_P] + t[APART_P],
        s[APART_Q] + t[APART_Q],
        b_max_1,
        s[SUM_1] + t[SUM_1],
    )


@triton.jit
def folded(s, b_target, b_at_1, b_z, b_zq, m_v, SLOTS: tl.constexpr):
    """The sums with a tile more: its logits at temperature 1, the tempered ones and the reference's, (rows, columns);
    a column that is not there is NOTHING in each."""
    b_max, b_max_q, b_max_1 = tl.maximum(s[MAX], tl.max(b_z, 1)), s[MAX_Q], s[MAX_1]
    if has(SLOTS, MAX_Q):
        b_max_q = tl.maximum(b_max_q, tl.max(b_zq, 1))
    if has(SLOTS, MAX_1):
        b_max_1 = tl.maximum(b_max_1, tl.max(b_at_1, 1))
    s = moved(s, b_max, b_max_q, b_max_1)
    b_sum_z, b_sum_sq, b_total, b_sum_1 = s[SUM_Z], s[SUM_SQ], s[TOTAL], s[SUM_1]
    b_sum_q, b_apart_p, b_apart_q = s[SUM_Q], s[APART_P], s[APART_Q]
    b_x = b_z - b_max[:, None]
    b_e = tl.exp(b_x)
    if has(SLOTS, SUM_Z):  # sum e^(z-m) (z-m)
        b_sum_z += tl.sum(b_e * b_x, 1)
    if has(SLOTS, SUM_SQ):
        b_sum_sq += tl.sum(b_e * b_e, 1)
    if has(SLOTS, TOTAL):
        b_total += tl.sum(tl.where(m_v, b_z, 0.0), 1)
    if has(SLOTS, MAX_1):
        b_sum_1 += tl.sum(tl.exp(b_at_1 - b_max_1[:, None]), 1)
    if has(SLOTS, MAX_Q):
        b_xq = b_zq - b_max_q[:, None]
        b_eq = tl.exp(b_xq)
        b_sum_q += tl.sum(b_eq, 1)
        if has(SLOTS, APART_P):  # sum e^(z-m) ((z-m) - (zq-mq))
            b_apart_p += tl.sum(b_e * (b_x - b_xq), 1)
        if has(SLOTS, APART_Q):  # sum e^(zq-mq) ((zq-mq) - (z-m))
            b_apart_q += tl.sum(b_eq * (b_xq - b_x), 1)
    return (
        b_max, s[SUM] + tl.sum(b_e, 1), b_target, b_sum_z, b_sum_sq, b_total,
        b_max_q, b_sum_q, b_apart_p, b_apart_q, b_max_1, b_sum_1,
    )  # fmt: skip
