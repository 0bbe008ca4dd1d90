"""The row kernels, in torch: everything that is ever done to a row of logits. kernels/triton/rows.py is the same on a
GPU.

A tile is (R rows, B vocabulary columns) of raw products hidden @ weight.T, in fp32 (float64 for float64 inputs).

  fold     tile -> running sums of each row, so that a row need not be in memory at once (online softmax,
           arXiv:1805.02867)
  mixture  the same for the two sums of the JSD, whose integrand needs the finished logsumexps
  grads    tile, dL/dstatistics -> dL/dtile

With z the tempered logits, p = softmax(z), every statistic is a function of a few sums over the row, and its gradient
in z is a combination of the row vectors 1_y, p, p log p, p log p/q, q, 1, p^2, p log p/m. `finish` and `coefficients`
say which, on R numbers.

Sums are kept relative to a running maximum m: when m grows by -shift, S = sum e^(z-m) becomes e^shift S and sum e^(z-m)
(z-m) becomes e^shift (itself + shift S). m and log S stay apart to the end, log p = (z - m) - log S: their sum, the
logsumexp, is rounded to its own size, and that rounding would be a relative error of every probability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch
from torch import Tensor

# A logit of -inf (a banned token, through the bias) is taken as this: exp gives 0, and 0 * LOWEST is 0 where 0 * inf is
# not.
LOWEST = -1e30
# A running maximum before the first tile: below LOWEST at any scale and temperature.
NOTHING = -1e38

# Rows of the state: the running maxima and sums of each row.
MAX, SUM, TARGET, SUM_Z, SUM_SQ, TOTAL, MAX_Q, SUM_Q, APART_P, APART_Q, MAX_1, SUM_1, P_M, Q_M = range(14)
STATE_ROWS = 14

# Rows of the coefficients: multipliers of the row vectors, then the constants that turn logits into log-probabilities.
C_TARGET, C_P, C_PLOGP, C_APART_Q, C_Q, C_PSQ, C_ONE, C_APART_M, C_AT_1 = range(9)
C_MAX, C_LOG_SUM, C_MAX_Q, C_LOG_SUM_Q, C_MAX_1, C_LOG_SUM_1, C_LOG_SUM_SQ = range(9, 16)
COEFFICIENT_ROWS = 16

LAYOUT = 7  # of the two lists above and of the kernels: a native extension compiled for another is not used


class Shape(NamedTuple):
    """How raw products become logits: softcap(scale * (raw + bias))."""

    bias: Tensor | None  # (B,), of the tile's columns
    scale: float
    softcap: float | None


def new_state(rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:  # (STATE_ROWS, R)
    state = torch.zeros(STATE_ROWS, rows, device=device, dtype=dtype)
    for slot in (MAX, MAX_Q, MAX_1):
        state[slot] = NOTHING
    state[TARGET] = torch.nan  # a target outside the vocabulary is met by no tile, and says so
    return state


def shaped(raw: Tensor, shape: Shape, out: Tensor) -> Tensor:  # (R, B)
    """Logits at temperature 1, written to `out` unless they are the raw products themselves."""
    if shape.bias is not None:
        raw = torch.add(raw, shape.bias.to(raw.dtype), out=out).clamp_(min=LOWEST)
    if shape.softcap is not None:
        return torch.mul(raw, shape.scale / shape.softcap, out=out).tanh_().mul_(shape.softcap)
    return raw if shape.scale == 1.0 else torch.mul(raw, shape.scale, out=out)


class TorchRows:
    """The kernels and their scratch: on a CPU a fresh tile costs ten times the arithmetic done in it (page faults)."""

    def __init__(self):
        self._scratch: dict[str, Tensor] = {}

    def _tile(self, name: str, like: Tensor) -> Tensor:
        tile = self._scratch.get(name)
        if tile is None or tile.numel() < like.numel():
            tile = self._scratch[name] = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        return tile[: like.numel()].view(like.shape)

    def _tempered(
        self, name: str, raw: Tensor, shape: Shape, inverse_temperature: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        at_1 = shaped(raw, shape, self._tile(name + " at 1", raw))
        if inverse_temperature is None:
            return at_1, at_1
        return at_1, torch.mul(at_1, inverse_temperature[:, None], out=self._tile(name, raw))

    def _shift(self, state: Tensor, slot: int, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Moves the maximum in `slot` over z; writes z - max to x; returns (shift, e^shift) for the sums."""
        old = state[slot].clone()
        torch.maximum(old, z.amax(1), out=state[slot])
        torch.sub(z, state[slot, :, None], out=x)
        shift = old - state[slot]
        return shift, shift.exp()

    def fold(
        self,
        state: Tensor,  # (STATE_ROWS, R), updated
        tile: Tensor,  # (R, B) raw products, kept
        target: Tensor,  # (R,) column of the whole vocabulary
        start: int,  # the tile's first column
        shape: Shape,
        inverse_temperature: Tensor | None,  # (R,)
        wants: AbstractSet[str],
        tile_q: Tensor | None = None,  # (R, B) the reference's raw products
        shape_q: Shape | None = None,
        out: Tensor | None = None,  # (R, B) receives e^(z - max) dz/dlogit, 0 at the target, for a product
    ) -> None:
        at_1, z = self._tempered("z", tile, shape, inverse_temperature)
        column = (target - start).clamp(0, tile.shape[1] - 1)
        here = column == target - start
        state[TARGET] = torch.where(here, at_1.gather(1, column[:, None])[:, 0], state[TARGET])
        if "mean_logp" in wants:
            state[TOTAL] += z.sum(1)
        if "logp@1" in wants:
            x = self._tile("x", z)
            _, decay = self._shift(state, MAX_1, at_1, x)
            state[SUM_1] = state[SUM_1] * decay + x.exp_().sum(1)

        x, e, product = self._tile("x", z), self._tile("e", z), self._tile("product", z)
        shift, decay = self._shift(state, MAX, z, x)
        torch.exp(x, out=e)
        if "entropy" in wants:  # sum e^(z-m) (z-m)
            state[SUM_Z] = (state[SUM_Z] + shift * state[SUM]) * decay + torch.mul(e, x, out=product).sum(1)
        if "log_sum_sq" in wants:
            state[SUM_SQ] = state[SUM_SQ] * decay.square() + torch.mul(e, e, out=product).sum(1)
        if tile_q is not None and shape_q is not None:
            _, zq = self._tempered("zq", tile_q, shape_q, inverse_temperature)
            xq = self._tile("xq", z)
            shift_q, decay_q = self._shift(state, MAX_Q, zq, xq)
            # The difference is summed, not the sums subtracted: of two nearly equal distributions it is all there is.
            if "reverse_kl" in wants:  # sum e^(z-m) ((z-m) - (zq-mq))
                apart = torch.sub(x, xq, out=product).mul_(e).sum(1)
                state[APART_P] = (state[APART_P] + (shift - shift_q) * state[SUM]) * decay + apart
            eq = torch.exp(xq, out=self._tile("eq", z))
            if "forward_kl" in wants:  # sum e^(zq-mq) ((zq-mq) - (z-m))
                apart = torch.sub(xq, x, out=product).mul_(eq).sum(1)
                state[APART_Q] = (state[APART_Q] + (shift_q - shift) * state[SUM_Q]) * decay_q + apart
            state[SUM_Q] = state[SUM_Q] * decay_q + eq.sum(1)
        state[SUM] = state[SUM] * decay + e.sum(1)
        if out is not None:
            # The target's own share is added outside, in fp32: rounded to bf16 it would lose what 1 - p has left.
            x = e if shape.softcap is None else torch.mul(e, _cap_slope(at_1, shape.softcap, product), out=product)
            out.copy_(x.scatter_reduce_(1, column[:, None], torch.where(here, 0, torch.inf).to(x)[:, None], "amin"))

    def mixture(
        self,
        state: Tensor,  # (STATE_ROWS, R): P_M and Q_M are updated
        tile: Tensor,  # (R, B)
        shape: Shape,
        inverse_temperature: Tensor | None,
        tile_q: Tensor,
        shape_q: Shape,
        beta: float,
    ) -> None:
        """KL(p || m) and KL(q || m), m = beta q + (1 - beta) p, once the maxima and sums of the state are whole."""
        z = self._tempered("z", tile, shape, inverse_temperature)[1]
        zq = self._tempered("zq", tile_q, shape_q, inverse_temperature)[1]
        logp = log_probability(z, state[MAX], state[SUM].log(), self._tile("x", z))
        logq = log_probability(zq, state[MAX_Q], state[SUM_Q].log(), self._tile("xq", z))
        logm = log_mixture(logp, logq, beta)
        product = self._tile("product", z)
        for slot, log_one in ((P_M, logp), (Q_M, logq)):
            e = torch.exp(log_one, out=self._tile("e", z))
            state[slot] += e.mul_(torch.sub(log_one, logm, out=product)).sum(1)

    def grads(
        self,
        tile: Tensor,  # (R, B) raw products
        target: Tensor,  # (R,)
        start: int,
        shape: Shape,
        inverse_temperature: Tensor | None,  # (R,)
        c: Tensor,  # (COEFFICIENT_ROWS, R)
        wants: AbstractSet[str],  # the statistics whose gradient is not zero
        out: Tensor,  # (R, B) receives dL/dtile in its own dtype; may be the tile itself
        tile_q: Tensor | None = None,
        shape_q: Shape | None = None,
        beta: float = 0.5,
    ) -> None:
        at_1, z = self._tempered("z", tile, shape, inverse_temperature)
        logp = log_probability(z, c[C_MAX], c[C_LOG_SUM], self._tile("x", z))
        p = torch.exp(logp, out=self._tile("e", z))
        d, product = self._tile("d", z), self._tile("product", z)
        torch.mul(p, c[C_P, :, None], out=d)
        if "entropy" in wants:
            d += torch.mul(p, logp, out=product).mul_(c[C_PLOGP, :, None])
        if "log_sum_sq" in wants:  # 2 p^2 / sum p^2
            d += torch.mul(logp, 2.0, out=product).sub_(c[C_LOG_SUM_SQ, :, None]).exp_().mul_(c[C_PSQ, :, None])
        if tile_q is not None and shape_q is not None:
            _, zq = self._tempered("zq", tile_q, shape_q, inverse_temperature)
            logq = log_probability(zq, c[C_MAX_Q], c[C_LOG_SUM_Q], self._tile("xq", z))
            if "reverse_kl" in wants:
                d += torch.sub(logp, logq, out=product).mul_(p).mul_(c[C_APART_Q, :, None])
            if "jsd" in wants:
                logm = log_mixture(logp, logq, beta)
                d += torch.sub(logp, logm, out=product).mul_(p).mul_(c[C_APART_M, :, None])
            if "forward_kl" in wants:
                d += torch.exp(logq, out=product).mul_(c[C_Q, :, None])
        if "mean_logp" in wants:
            d += c[C_ONE, :, None]
        column = target - start
        onehot = torch.where((column >= 0) & (column < d.shape[1]), c[C_TARGET], 0.0)
        d.scatter_add_(1, column.clamp(0, d.shape[1] - 1)[:, None], onehot[:, None])
        if inverse_temperature is not None:
            d *= inverse_temperature[:, None]
        if "logp@1" in wants:  # 1_y - softmax of the untempered row
            d -= log_probability(at_1, c[C_MAX_1], c[C_LOG_SUM_1], product).exp_().mul_(c[C_AT_1, :, None])
            onehot = torch.where((column >= 0) & (column < d.shape[1]), c[C_AT_1], 0.0)
            d.scatter_add_(1, column.clamp(0, d.shape[1] - 1)[:, None], onehot[:, None])
        if shape.softcap is not None:
            d *= _cap_slope(at_1, shape.softcap, product)
        out.copy_(d if shape.scale == 1.0 else d.mul_(shape.scale))


def rescale(tile: Tensor, factor: Tensor, target: Tensor, start: int, own: Tensor) -> None:
    """What `fold` wrote to `out` (R, B) becomes dL/dtile: times factor (R,), and own (R,) in the target's column."""
    column = (target - start).clamp(0, tile.shape[1] - 1)[:, None]
    here = column == (target - start)[:, None]
    tile.mul_(factor[:, None])
    tile.scatter_(1, column, torch.where(here, own.to(tile.dtype)[:, None], tile.gather(1, column)))


def log_probability(z: Tensor, maximum: Tensor, log_sum: Tensor, out: Tensor) -> Tensor:  # (R, B), (R,), (R,)
    return torch.sub(z, maximum[:, None], out=out).sub_(log_sum[:, None])


def log_mixture(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p)"""
    return torch.logaddexp(logp + math.log1p(-beta), logq + math.log(beta))


def _cap_slope(logits: Tensor, softcap: float, out: Tensor) -> Tensor:
    """d softcap(x) / dx = 1 - tanh(x / c)^2, from the capped logits c tanh(x / c)."""
    return torch.div(logits, softcap, out=out).square_().neg_().add_(1.0)


def finish(
    state: Tensor,  # (STATE_ROWS, R)
    wants: AbstractSet[str],
    vocabulary: int,
    inverse_temperature: Tensor | None,  # (R,)
) -> dict[str, Tensor]:
    """The statistics that were asked for, by the names of `token_stats`, and lse, and what `coefficients` needs of the
    rest."""
    log_sum, log_sum_q = state[SUM].log(), state[SUM_Q].log()
    at_1 = state[TARGET]
    z_target = at_1 if inverse_temperature is None else at_1 * inverse_temperature
    stats = {"max": state[MAX], "log_sum": log_sum, "lse": state[MAX] + log_sum}
    stats["logp"] = (z_target - state[MAX] - log_sum).clamp(max=0)
    if "top1" in wants:
        stats["top1"] = z_target >= state[MAX]
    if "logp@1" in wants:
        stats |= {"max@1": state[MAX_1], "log_sum@1": state[SUM_1].log()}
        stats["logp@1"] = (at_1 - state[MAX_1] - stats["log_sum@1"]).clamp(max=0)
    if "entropy" in wants:
        stats["entropy"] = (log_sum - state[SUM_Z] / state[SUM]).clamp(min=0)
    if "log_sum_sq" in wants:
        stats["log_sum_sq"] = (state[SUM_SQ].log() - 2 * log_sum).clamp(max=0)
    if "mean_logp" in wants:
        stats["mean_logp"] = state[TOTAL] / vocabulary - stats["lse"]
    if wants & {"reverse_kl", "forward_kl", "jsd"}:
        stats |= {"max_q": state[MAX_Q], "log_sum_q": log_sum_q}
    if "reverse_kl" in wants:
        stats["reverse_kl"] = (state[APART_P] / state[SUM] - log_sum + log_sum_q).clamp(min=0)
    if "forward_kl" in wants:
        stats["forward_kl"] = (state[APART_Q] / state[SUM_Q] - log_sum_q + log_sum).clamp(min=0)
    return stats


def finish_mixture(state: Tensor, beta: float) -> dict[str, Tensor]:
    """The JSD, and KL(p || m) for its gradient."""
    return {"kl_p_m": state[P_M], "jsd": (beta * state[Q_M] + (1 - beta) * state[P_M]).clamp(min=0)}


def coefficients(
    stats: Mapping[str, Tensor],  # from `finish`
    d: Mapping[str, Tensor],  # (R,) dL/dstatistic
    vocabulary: int,
    beta: float,
) -> Tensor:  # (COEFFICIENT_ROWS, R)
    """dL/dz = sum over statistics of dL/ds * ds/dz, gathered by row vector.

    ds/dz:  logp  1_y - p                   lse  p                        mean_logp   1/V - p
            entropy  -p (log p + H)         reverse_kl  p (log p - log q - KL)    forward_kl  p - q
            log_sum_sq  2 (p^2 / sum p^2 - p)        jsd  (1 - b) p (log p - log m - KL(p || m))
    """
    c = torch.zeros(COEFFICIENT_ROWS, len(stats["lse"]), dtype=stats["lse"].dtype, device=stats["lse"].device)
    c[C_MAX], c[C_LOG_SUM] = stats["max"], stats["log_sum"]
    if "max_q" in stats:
        c[C_MAX_Q], c[C_LOG_SUM_Q] = stats["max_q"], stats["log_sum_q"]
    if "logp" in d:
        c[C_TARGET] = d["logp"]
        c[C_P] -= d["logp"]
    if "lse" in d:
        c[C_P] += d["lse"]
    if "entropy" in d:
        c[C_P] -= d["entropy"] * stats["entropy"]
        c[C_PLOGP] -= d["entropy"]
    if "reverse_kl" in d:
        c[C_P] -= d["reverse_kl"] * stats["reverse_kl"]
        c[C_APART_Q] = d["reverse_kl"]
    if "forward_kl" in d:
        c[C_P] += d["forward_kl"]
        c[C_Q] = -d["forward_kl"]
    if "jsd" in d:
        c[C_P] -= (1 - beta) * d["jsd"] * stats["kl_p_m"]
        c[C_APART_M] = (1 - beta) * d["jsd"]
    if "log_sum_sq" in d:
        c[C_P] -= 2 * d["log_sum_sq"]
        c[C_PSQ] = 2 * d["log_sum_sq"]
        c[C_LOG_SUM_SQ] = stats["log_sum_sq"]
    if "mean_logp" in d:
        c[C_P] -= d["mean_logp"]
        c[C_ONE] = d["mean_logp"] / vocabulary
    if "logp@1" in d:
        c[C_AT_1] = d["logp@1"]
        c[C_MAX_1], c[C_LOG_SUM_1] = stats["max@1"], stats["log_sum@1"]
    return c
