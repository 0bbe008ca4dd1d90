"""The public door of the head: checks every argument once, drops ignored and idle rows, and hands on a `Problem`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastpost.core.checks import (
    check_hidden,
    check_kept_teacher,
    check_kept_temperatures,
    check_outputs,
    check_reference,
    check_teacher,
    check_temperature,
)
from fastpost.core.compaction import find_rows
from fastpost.core.lowrank import low_rank
from fastpost.core.problem import Operands, Problem, Reference
from fastpost.core.quantised import Quantised, Weight, same
from fastpost.types import NEEDS_REFERENCE, OUTPUTS, Head, Stats, TopK


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


def _inverse_temperature(
    temperature: float | Tensor, target: Tensor, index: Tensor | None, hidden: Tensor
) -> Tensor | None:
    """(N,), or None at temperature 1. A tensor is trusted to be positive where that cannot be seen without a sync."""
    check_temperature(temperature, target)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if not isinstance(temperature, Tensor):
        n = target.numel() if index is None else len(index)
        return None if temperature == 1 else torch.full((n,), 1 / temperature, dtype=dtype, device=hidden.device)
    flat = temperature.expand(target.shape).detach().to(hidden.device, dtype).reshape(-1)
    kept = flat if index is None else flat.index_select(0, index)
    check_kept_temperatures(kept)
    return 1 / kept


def _teacher(teacher: TopK, hidden: Tensor, head: Head, target: Tensor, index: Tensor | None) -> TopK:
    """Of the kept rows."""
    check_teacher(teacher, head, target)
    ids, logp = (x.detach().reshape(-1, x.shape[-1]).to(hidden.device) for x in (teacher.ids, teacher.logp))
    if index is not None:
        ids, logp = ids.index_select(0, index), logp.index_select(0, index)
    check_kept_teacher(ids, logp, head.vocabulary)
    return TopK(ids, logp, teacher.rest)


def _reference(
    reference: tuple[Tensor, Head | Tensor] | TopK | None,
    hidden: Tensor,
    head: Head,
    target: Tensor,
    index: Tensor | None,
    dtype: torch.dtype,
) -> Reference | TopK:
    if isinstance(reference, TopK):
        return _teacher(reference, hidden, head, target, index)
    if not isinstance(reference, tuple) or len(reference) != 2:
        raise ValueError(f"reference must be (hidden_q, head_q) or a fastpost.TopK, got {type(reference).__name__}")
    hidden_q, head_q = reference[0], _head(reference[1], "the reference's head")
    check_reference(hidden_q, head_q, hidden, head, target)
    with torch.no_grad():
        operands = _operands(hidden_q, head_q, index, dtype)
    constant = Operands._make(x.detach() if isinstance(x, Tensor) else x for x in operands)
    # The same tensor, not an alias of it, where policy and reference share a head: a sweep then widens its blocks once.
    if same(head_q.weight, head.weight):
        constant = constant._replace(weight=head.weight)
    return Reference(constant, float(head_q.scale), None if head_q.softcap is None else float(head_q.softcap))


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
    check_hidden(hidden, head, target)
    check_outputs(outputs, reference, jsd_beta)
    flat = target.reshape(-1).contiguous()
    index, idle, mask, multiplied = find_rows(flat, ignore_index, head.vocabulary, kept, lengths, live)
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
