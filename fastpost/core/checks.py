"""What the head refuses of a call: a ValueError that names the argument, what was got, and what would be right.

Nothing here changes anything; values on an accelerator, to look at which is to wait, are trusted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fastpost.core.quantised import Quantised
from fastpost.types import NEEDS_REFERENCE, OUTPUTS, Head, TopK, nearest

TOO_LIKELY = 1e-2  # by how much a teacher's stored probabilities may exceed one: what bfloat16 rounding makes of them


def check_hidden(hidden: Tensor, head: Head, target: Tensor, name: str = "hidden") -> None:
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
    _check_devices(hidden, head, target, name)


def _check_devices(hidden: Tensor, head: Head, target: Tensor, name: str) -> None:
    beside = [("target", target), ("head.weight", head.weight), ("head.bias", head.bias)]
    for adapter in head.lora:
        beside += [("LowRank.a", adapter.a), ("LowRank.b", adapter.b)]
    for what, other in beside:
        if other is not None and other.device != hidden.device:
            raise ValueError(f"{name} is on {hidden.device} and {what} on {other.device}")


def check_outputs(outputs: Sequence[str], reference: object, jsd_beta: float) -> None:
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


def check_range(target: Tensor, vocabulary: int) -> None:
    outside = target[(target < 0) | (target >= vocabulary)]
    if len(outside):
        raise ValueError(
            f"target must be in [0, {vocabulary}), the vocabulary of the head, or ignored; got {int(outside[0])} "
            f"({len(outside)} such targets)"
        )


def check_temperature(temperature: float | Tensor, target: Tensor) -> None:
    if isinstance(temperature, Tensor):
        if temperature.ndim and temperature.shape != target.shape:
            raise ValueError(
                f"temperature must be a number or have target's shape {tuple(target.shape)}, "
                f"got {tuple(temperature.shape)}"
            )
        return
    if not isinstance(temperature, int | float):
        raise ValueError(f"temperature must be a number or a tensor, got {temperature!r}")
    if not (temperature > 0 and temperature < float("inf")):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def check_kept_temperatures(kept: Tensor) -> None:  # (N,)
    if kept.device.type == "cpu" and not bool(((kept > 0) & kept.isfinite()).all()):
        raise ValueError("temperature must be positive and finite for every token that is not ignored")


def check_teacher(teacher: TopK, head: Head, target: Tensor) -> None:
    if head.shard is not None:
        raise ValueError("reference must be (hidden_q, head_q) where the head is sharded, got a TopK")
    if teacher.ids.shape[:-1] != target.shape:
        raise ValueError(
            f"reference TopK {tuple(teacher.ids.shape)} and target {tuple(target.shape)} must agree in all but "
            "the last dimension"
        )


def check_kept_teacher(ids: Tensor, logp: Tensor, vocabulary: int) -> None:  # (N, K), (N, K)
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high, ordered = int(ids.min()), int(ids.max()), ids.sort(1)[0]
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"reference TopK.ids must be in [0, {vocabulary}), the head's vocabulary, got {low if low < 0 else high}"
        )
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError("reference TopK.ids must be distinct within a row")
    total = logp.float().exp().sum(1)
    if not bool((total <= 1 + TOO_LIKELY).all()):
        worst = float(total.nan_to_num(torch.inf).max())
        raise ValueError(f"reference TopK.logp must be log-probabilities: a row of them sums to {worst:.4g}")


def check_reference(hidden_q: Tensor, head_q: Head, hidden: Tensor, head: Head, target: Tensor) -> None:
    check_hidden(hidden_q, head_q, target, "the reference's hidden")
    if _pieces(head_q) != _pieces(head):
        raise ValueError(
            f"the reference's head must be sharded as the policy's is, got {head_q.shard} beside {head.shard}"
        )
    if head_q.vocabulary != head.vocabulary:
        raise ValueError(
            f"the reference's head has a vocabulary of {head_q.vocabulary} and the policy's one of {head.vocabulary}: "
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


def _pieces(head: Head) -> tuple[tuple[int, ...], list[int]] | None:
    """Which rank has how many rows; groups made twice over the same ranks are different objects."""
    return None if head.shard is None else (head.shard.sizes, head.shard.ranks)
