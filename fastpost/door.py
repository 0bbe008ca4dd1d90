"""The public door of the head: checks every argument once, drops ignored and idle rows, and hands on a `Problem`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastpost.lowrank import low_rank
from fastpost.quantised import Quantised, Weight, same
from fastpost.sweep import Operands, Problem, Reference
from fastpost.types import NEEDS_REFERENCE, OUTPUTS, Head, Stats, TopK, nearest

TOO_LIKELY = 1e-2  # by how much a teacher's stored probabilities may exceed one: what bfloat16 rounding makes of them


def eager_only(function: Callable) -> Callable:
    """Under torch.compile the call runs as it is, between two graphs.

    (The decorator torch.compiler.disable does the same, and imports the compiler: 1.6 s of everybody's import.)
    """

    @functools.wraps(function)
    def call(*args, **knobs):
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(function)(*args, **knobs)
        return function(*args, **knobs)

    return call


class Rows(NamedTuple):
    """Which positions are multiplied, and which are not."""

    index: Tensor | None  # (N,) ascending; None: all
    idle: Tensor | None = None  # (M,) kept ones that are left out, their coefficient being zero; None: none
    mask: Tensor | None = None  # (T,) bool, where ignored rows could not be left out (graph capture) and are zeroed
    lengths: Tensor | None = None  # (S,) on the host, how many of each sequence are multiplied, if that was counted


@dataclass(frozen=True)
class Door:
    """A checked call: the gradient-carrying tensors, the problem, and the way back to the caller's shape."""

    operands: Operands
    problem: Problem
    shape: torch.Size  # of target
    kept: Tensor | None  # (T,) bool, Rows.mask
    idle: Tensor | None  # (M,) Rows.idle
    lengths: Tensor | None  # (S,) Rows.lengths
    renamed: dict[str, str]  # an end of the JSD family -> the KL that it is

    @property
    def needs_rows(self) -> bool:
        """Whether what is known of the rows carries a gradient."""
        return _trains(self.operands.hidden, self.operands.low)

    @property
    def needs_head(self) -> bool:
        return _trains(self.operands.weight, self.operands.bias, self.operands.b)

    def inner(self, name: str) -> str:
        return self.renamed.get(name, name)

    def scatter(self, values: Tensor) -> Tensor:  # (N,) -> target's shape
        """Kept rows back in their places, zeros in the others."""
        index = self.problem.index
        if index is not None:
            values = values.new_zeros(self.shape.numel()).index_copy(0, index, values)
        elif self.kept is not None:
            values = torch.where(self.kept, values, torch.zeros_like(values))
        return values.view(self.shape)

    def stats(self, values: dict[str, Tensor], outputs: Sequence[str]) -> Stats:
        return Stats(**{OUTPUTS[name]: self.scatter(values[self.inner(name)]) for name in outputs})


def _trains(*tensors: Weight | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def open_door(
    hidden: Tensor,
    head: Head | Tensor,
    target: Tensor,
    outputs: Sequence[str],
    reference: tuple[Tensor, Head | Tensor] | TopK | None,
    temperature: float | Tensor,
    jsd_beta: float,
    ignore_index: int,
    kept: Tensor | None = None,  # (N,) positions of kept rows, where the caller knows them
    lengths: Tensor | None = None,  # (S,) of a batch; they must sum to T
    live: Tensor | None = None,  # (T,) bool, those of the kept rows that are not idle; None: all
) -> Door:
    head = _head(head, "head")
    if not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index must be an integer, got {ignore_index!r}")
    _check_hidden(hidden, head, target)
    _check_outputs(outputs, reference, jsd_beta)
    flat = target.reshape(-1).contiguous()
    index, idle, mask, multiplied = _find_rows(flat, ignore_index, head.vocabulary, kept, lengths, live)
    if mask is not None:
        flat = torch.where(mask, flat, 0)
    rows = flat if index is None else flat.index_select(0, index)
    renamed = {"jsd": {0.0: "forward_kl", 1.0: "reverse_kl"}[float(jsd_beta)]} if jsd_beta in (0, 1) else {}
    wants = frozenset(renamed.get(name, name) for name in outputs)
    dtype = _operand_dtype(hidden, head)
    head = _in_dtype(head, dtype)
    problem = Problem(
        target=rows if head.shard is None else rows - head.shard.start,
        index=index,
        wants=wants,
        scale=float(head.scale),
        softcap=None if head.softcap is None else float(head.softcap),
        inverse_temperature=_inverse_temperature(temperature, target, index, hidden),
        reference=_reference(reference, hidden, head, target, index, dtype) if wants & NEEDS_REFERENCE else None,
        jsd_beta=float(jsd_beta),
        dtype=dtype,
        shard=head.shard,
    )
    return Door(_operands(hidden, head, index, dtype), problem, target.shape, mask, idle, multiplied, renamed)


def _operands(hidden: Tensor, head: Head, index: Tensor | None, dtype: torch.dtype) -> Operands:
    flat, head = hidden.reshape(-1, hidden.shape[-1]), _in_dtype(head, dtype)
    return Operands(flat, head.weight, head.bias, *low_rank(flat, head.lora, index, dtype))


def _head(head: Head | Tensor, name: str) -> Head:
    if isinstance(head, Tensor):
        return Head(head)
    if not isinstance(head, Head):
        raise ValueError(
            f"{name} must be a fastpost.Head or a (V, D) weight, got {type(head).__name__}; see Head.of(model)"
        )
    return head


def _in_dtype(head: Head, dtype: torch.dtype) -> Head:
    """A quantised weight is dequantised straight to the dtype of the operands; any other is rounded as it is used."""
    return replace(head, weight=head.weight.to(dtype)) if isinstance(head.weight, Quantised) else head


def _operand_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    """The dtype in which the layer would multiply: a quantised one's own, or that of F.linear, which is autocast's
    where it is on, else the one that both have."""
    device, quantised = hidden.device.type, isinstance(head.weight, Quantised)
    if torch.float64 not in (hidden.dtype, head.weight.dtype):
        if quantised and head.weight.dtype is not None:
            return head.weight.dtype
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    if hidden.dtype != head.weight.dtype and not quantised:
        raise ValueError(
            f"hidden and head.weight must have one dtype outside autocast, got {hidden.dtype} and {head.weight.dtype}"
        )
    return hidden.dtype


def _check_hidden(hidden: Tensor, head: Head, target: Tensor, name: str = "hidden") -> None:
    if not isinstance(target, Tensor):
        raise ValueError(f"target must be an int64 tensor, got {type(target).__name__}")
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise ValueError(
            f"{name} must be a floating tensor (..., D), got {getattr(hidden, 'dtype', type(hidden).__name__)}"
        )
    if hidden.ndim == 0 or hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"{name} {tuple(hidden.shape)} and its head's weight {tuple(head.weight.shape)} must have one D"
        )
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}")
    flat = hidden.ndim == 3 and hidden.shape[0] == 1 and target.shape == hidden.shape[1:2]  # a packed trunk's (1, T, D)
    if hidden.shape[:-1] != target.shape and not flat:
        raise ValueError(
            f"{name} {tuple(hidden.shape)} and target {tuple(target.shape)} must agree in all but the last dimension"
        )
    if target.numel() == 0:
        raise ValueError(f"target is empty: {name} has shape {tuple(hidden.shape)}")
    beside = [("target", target), ("head.weight", head.weight), ("head.bias", head.bias)]
    for adapter in head.lora:
        beside += [("LowRank.a", adapter.a), ("LowRank.b", adapter.b)]
    for what, other in beside:
        if other is not None and other.device != hidden.device:
            raise ValueError(f"{name} is on {hidden.device} and {what} on {other.device}")


def _check_outputs(outputs: Sequence[str], reference: object, jsd_beta: float) -> None:
    if isinstance(outputs, str):
        raise ValueError(f"outputs must be a sequence of names, got the string {outputs!r}: write ({outputs!r},)")
    if not isinstance(outputs, Collection) or not all(isinstance(name, str) for name in outputs):
        raise ValueError(f"outputs must be a sequence of names, got {outputs!r}")
    for name in outputs:
        if name not in OUTPUTS:
            raise ValueError(f"unknown output {name!r}{nearest(name, list(OUTPUTS))}; known: {', '.join(OUTPUTS)}")
        if name in NEEDS_REFERENCE and reference is None:
            raise ValueError(
                f"output {name!r} compares two distributions: pass reference=(hidden_q, head_q) or a fastpost.TopK"
            )
    if not isinstance(jsd_beta, int | float) or not 0 <= jsd_beta <= 1:
        raise ValueError(f"jsd_beta must be in [0, 1], got {jsd_beta!r}")
    infinite = {"reverse_kl"} | ({"jsd"} if jsd_beta == 1 else set())
    if isinstance(reference, TopK) and reference.rest == "renormalize" and infinite & set(outputs):
        raise ValueError(
            "reverse_kl to a renormalised TopK teacher is infinite (it gives the rest nothing): use rest='bucket'"
        )


def _find_rows(
    target: Tensor,  # (T,)
    ignore_index: int,
    vocabulary: int,
    known: Tensor | None,
    lengths: Tensor | None,
    live: Tensor | None,
) -> Rows:
    """On an accelerator this is the call's one host sync."""
    if known is not None and live is None:
        if target.device.type == "cpu":
            _check_range(target.index_select(0, known), vocabulary)
        return Rows(None if len(known) == len(target) else known.to(target.device))
    mask = target != ignore_index
    if target.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return Rows(None, mask=mask)  # nothing may depend on a count: ignored rows go through, with coefficient 0
    live = mask if live is None else live
    outside = mask & ((target < 0) | (target >= vocabulary))
    # Lengths on the host were looked at by the Batch; others are looked at here, in the same transfer.
    ends = target.new_zeros(0) if lengths is None else lengths.to(mask.device, non_blocking=True).cumsum(0)
    total = ends[-1:] if len(ends) else torch.full((1,), len(target), device=mask.device)
    seen = torch.stack([mask.sum(), live.sum(), outside.sum()])
    kept, alive, bad, total, *each = torch.cat([seen, total, _between(live, ends)]).tolist()
    if bad:
        _check_range(target[mask], vocabulary)
    if total != len(target):
        raise ValueError(f"batch.lengths must sum to the {len(target)} positions of batch.target, got a sum of {total}")
    index = None if alive == len(target) else _where(live, alive)
    idle = None if alive == kept else _where(mask & ~live, kept - alive)
    return Rows(index, idle, lengths=None if lengths is None else torch.tensor(each, dtype=torch.int64))


def _between(mask: Tensor, ends: Tensor) -> Tensor:  # (T,) bool, (S,) -> (S,)
    """How many positions of each sequence are true."""
    before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    return before.index_select(0, ends.clamp(0, len(mask))).diff(prepend=before[:1])


def _where(mask: Tensor, count: int) -> Tensor:  # (T,) bool -> (count,)
    """The positions at which it is true, without asking how many they are."""
    return torch.argsort(mask.to(torch.uint8), descending=True, stable=True)[:count]


def _pieces(head: Head) -> tuple[tuple[int, ...], list[int]] | None:
    """Which rank has how many rows; groups made twice over the same ranks are different objects."""
    return None if head.shard is None else (head.shard.sizes, head.shard.ranks)


def _check_range(target: Tensor, vocabulary: int) -> None:
    outside = target[(target < 0) | (target >= vocabulary)]
    if len(outside):
        raise ValueError(
            f"target must be in [0, {vocabulary}), the vocabulary of the head, or ignored; got {int(outside[0])} "
            f"({len(outside)} such targets)"
        )


def _inverse_temperature(
    temperature: float | Tensor, target: Tensor, index: Tensor | None, hidden: Tensor
) -> Tensor | None:
    """(N,), or None at temperature 1. A tensor is trusted to be positive where that cannot be seen without a sync."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if not isinstance(temperature, Tensor):
        if not isinstance(temperature, int | float):
            raise ValueError(f"temperature must be a number or a tensor, got {temperature!r}")
        if not (temperature > 0 and temperature < float("inf")):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        if temperature == 1:
            return None
        n = target.numel() if index is None else len(index)
        return torch.full((n,), 1 / temperature, dtype=dtype, device=hidden.device)
    if temperature.ndim == 0:
        temperature = temperature.expand(target.shape)
    if temperature.shape != target.shape:
        raise ValueError(
            f"temperature must be a number or have target's shape {tuple(target.shape)}, got {tuple(temperature.shape)}"
        )
    flat = temperature.detach().to(hidden.device, dtype).reshape(-1)
    kept = flat if index is None else flat.index_select(0, index)
    if kept.device.type == "cpu" and not bool(((kept > 0) & kept.isfinite()).all()):
        raise ValueError("temperature must be positive and finite for every token that is not ignored")
    return 1 / kept


def _reference(
    reference: tuple[Tensor, Head | Tensor] | TopK | None,
    hidden: Tensor,
    head: Head,
    target: Tensor,
    index: Tensor | None,
    dtype: torch.dtype,
) -> Reference | TopK:
    V = head.vocabulary
    if isinstance(reference, TopK):
        if head.shard is not None:
            raise ValueError("reference must be (hidden_q, head_q) where the head is sharded, got a TopK")
        if reference.ids.shape[:-1] != target.shape:
            raise ValueError(
                f"reference TopK {tuple(reference.ids.shape)} and target {tuple(target.shape)} must agree in all but "
                "the last dimension"
            )
        ids, logp = (x.detach().reshape(-1, x.shape[-1]).to(hidden.device) for x in (reference.ids, reference.logp))
        if index is not None:
            ids, logp = ids.index_select(0, index), logp.index_select(0, index)
        if ids.device.type == "cpu" and ids.numel():
            low, high, ordered = int(ids.min()), int(ids.max()), ids.sort(1)[0]
            if low < 0 or high >= V:
                raise ValueError(
                    f"reference TopK.ids must be in [0, {V}), the head's vocabulary, got {low if low < 0 else high}"
                )
            if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
                raise ValueError("reference TopK.ids must be distinct within a row")
            total = logp.float().exp().sum(1)
            if not bool((total <= 1 + TOO_LIKELY).all()):
                worst = float(total.nan_to_num(torch.inf).max())
                raise ValueError(f"reference TopK.logp must be log-probabilities: a row of them sums to {worst:.4g}")
        return TopK(ids, logp, reference.rest)
    if not isinstance(reference, tuple) or len(reference) != 2:
        raise ValueError(f"reference must be (hidden_q, head_q) or a fastpost.TopK, got {type(reference).__name__}")
    hidden_q, head_q = reference[0], _head(reference[1], "the reference's head")
    _check_hidden(hidden_q, head_q, target, "the reference's hidden")
    if _pieces(head_q) != _pieces(head):
        raise ValueError(
            f"the reference's head must be sharded as the policy's is, got {head_q.shard} beside {head.shard}"
        )
    if head_q.vocabulary != V:
        raise ValueError(
            f"the reference's head has a vocabulary of {head_q.vocabulary} and the policy's one of {V}: "
            "they must be the same"
        )
    autocast, quantised = torch.is_autocast_enabled(hidden.device.type), isinstance(head_q.weight, Quantised)
    if hidden_q.dtype != hidden.dtype and not autocast:
        raise ValueError(
            f"hidden is {hidden.dtype} and the reference's hidden {hidden_q.dtype}: outside autocast they must agree"
        )
    if hidden_q.dtype != head_q.weight.dtype and not autocast and not quantised:
        raise ValueError(f"the reference's hidden is {hidden_q.dtype} and its head's weight {head_q.weight.dtype}")
    if hidden_q.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device} and the reference's hidden on {hidden_q.device}")
    with torch.no_grad():
        operands = _operands(hidden_q, head_q, index, dtype)
    constant = Operands._make(x.detach() if isinstance(x, Tensor) else x for x in operands)
    # The same tensor, not an alias of it, where policy and reference share a head: a sweep then widens its blocks once.
    if same(head_q.weight, head.weight):
        constant = constant._replace(weight=head.weight)
    return Reference(constant, float(head_q.scale), None if head_q.softcap is None else float(head_q.softcap))
