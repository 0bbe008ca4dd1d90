"""Batch: what a loss knows before the forward pass, and how it is cut without cutting a unit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from fastpost.types.checks import check_tensor
from fastpost.types.stats import NOT_GIVEN

Unit = Literal["token", "sequence", "pair", "batch"]

IGNORE = -100  # the target of a position where nothing is to be predicted

PER_TOKEN = ("old_logp", "ref_logp", "rollout_logp", "advantage", "old_value", "return_")
PER_SEQUENCE = ("label", "completion_length")
PER_PAIR = ("margin", "probability")


def check_pairs(S: int) -> None:
    """ValueError for an odd number of sequences."""
    if S % 2:
        raise ValueError(f"a pair is two adjacent sequences, chosen then rejected, but the batch has {S} sequences")


@dataclass(frozen=True)
class Batch:
    """A packed batch: S sequences laid end to end in T positions, with what is known of each before the forward pass.

    Positions count whole sequences, prompt and last position included; where nothing is to be predicted, target is
    -100. Pairs are adjacent sequences: chosen, then rejected.
    """

    target: Tensor  # (T,) int64, or -100
    lengths: Tensor  # (S,) int64, positions of each sequence in order; they sum to T
    old_logp: Tensor = NOT_GIVEN  # (T,) under the policy that is being improved; None: on policy
    ref_logp: Tensor = NOT_GIVEN  # (T,) under the reference
    rollout_logp: Tensor = NOT_GIVEN  # (T,) as the sampler reported it
    advantage: Tensor = NOT_GIVEN  # (T,); one of shape (S,) is spread over its sequence
    old_value: Tensor = NOT_GIVEN  # (T,)
    return_: Tensor = NOT_GIVEN  # (T,)
    label: Tensor = NOT_GIVEN  # (S,) bool, desirable or not (KTO)
    completion_length: Tensor = NOT_GIVEN  # (S,) tokens of the completion, before any masking
    margin: Tensor = NOT_GIVEN  # (S / 2,)
    probability: Tensor = NOT_GIVEN  # (S / 2,) that the chosen sequence is the better one; None: as sure as all
    kl: Tensor = NOT_GIVEN  # scalar, KTO's baseline
    weight: Tensor = NOT_GIVEN  # (U,) the normalisation; None: 1 / kept units
    kept: Tensor = NOT_GIVEN  # (N,) int64, positions with a target; a Batch from packing has them
    kept_lengths: Tensor = NOT_GIVEN  # (S,) int64 on the host, how many each sequence has; given with `kept`

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) is not None or field.name in ("target", "lengths"):
                check_tensor(f"batch.{field.name}", getattr(self, field.name))
        self._check_devices()
        T, S = self.target.numel(), self.lengths.numel()
        if self.target.ndim != 1:
            raise ValueError(f"batch.target must be flat, (T,), got shape {tuple(self.target.shape)}")
        if self.target.dtype != torch.int64:
            raise ValueError(f"batch.target must be int64, got {self.target.dtype}")
        if self.lengths.ndim != 1 or self.lengths.is_floating_point():
            raise ValueError(
                f"batch.lengths must be a flat integer tensor (S,), got {self.lengths.dtype} of shape "
                f"{tuple(self.lengths.shape)}"
            )
        # Only where reading costs nothing: on an accelerator the head looks at the sum, with the other range checks.
        if self.lengths.device.type == "cpu" and (
            S == 0 or int(self.lengths.min()) < 0 or int(self.lengths.sum()) != T
        ):
            raise ValueError(
                f"batch.lengths must be non-negative and sum to the {T} positions of batch.target, "
                f"got {S} lengths summing to {int(self.lengths.sum())}"
            )
        if self.advantage is not None and self.advantage.shape == (S,) and S != T:
            object.__setattr__(self, "advantage", self.spread(self.advantage))
        if self.label is not None and self.label.dtype != torch.bool:
            raise ValueError(f"batch.label must be bool, desirable or not, got {self.label.dtype}")
        shapes = dict.fromkeys(PER_TOKEN, (T,)) | dict.fromkeys(PER_SEQUENCE, (S,)) | dict.fromkeys(PER_PAIR, (S // 2,))
        for name, shape in (shapes | {"kl": ()}).items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"batch.{name} must have shape {shape} to match {T} positions in {S} sequences, "
                    f"got {tuple(value.shape)}"
                )

    def _check_devices(self) -> None:
        """Lengths are read on the host, and a scalar is taken from there as torch takes one."""
        home = self.target.device
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or value.device == home or "lengths" in field.name:
                continue
            if value.ndim or value.device.type != "cpu":
                raise ValueError(
                    f"batch.{field.name} is on {value.device} and batch.target on {home}: batch.to moves all of it"
                )

    @functools.cached_property
    def counts(self) -> Tensor:
        """(S,) lengths, beside the other tensors. A loss, whose batch has kept tokens alone, divides by these."""
        return self.lengths.to(self.target.device, non_blocking=True)

    @functools.cached_property
    def sequence(self) -> Tensor:
        """(T,) the index of each position's sequence."""
        position = torch.arange(self.target.numel(), device=self.target.device)
        # (repeat_interleave would write past its end where lengths on an accelerator, not looked at yet, are wrong)
        return torch.searchsorted(self.counts.cumsum(0), position, right=True).clamp(max=self.lengths.numel() - 1)

    def per_sequence(self, x: Tensor) -> Tensor:  # (T,) -> (S,)
        """The sum of x over each sequence."""
        return x.new_zeros(self.lengths.numel()).index_add(0, self.sequence, x)

    def mean_per_sequence(self, x: Tensor) -> Tensor:  # (T,) -> (S,)
        """The mean of x over each sequence, 0 over an empty one."""
        return self.per_sequence(x) / self.counts.clamp(min=1)

    def spread(self, x: Tensor) -> Tensor:  # (S,) -> (T,)
        """x of each position's sequence."""
        return x.index_select(0, self.sequence)

    def behaviour_logp(self, logp: Tensor) -> Tensor:  # (T,) -> (T,)
        """old_logp; where it was not given the policy that sampled is the one being trained, so logp itself, as a
        constant."""
        return logp.detach() if self.old_logp is None else self.old_logp

    def beyond_margin(self, difference: Tensor) -> Tensor:  # (S / 2,) -> (S / 2,)
        """difference less the margin that was asked for, if one was."""
        return difference if self.margin is None else difference - self.margin

    def doubt(self, otherwise: float) -> Tensor | float:  # (S / 2,)
        """The probability that the label of a pair is wrong, where it is known."""
        return otherwise if self.probability is None else 1 - self.probability

    @staticmethod
    def pairs(x: Tensor) -> tuple[Tensor, Tensor]:  # (S,) -> (S / 2,), (S / 2,)
        """(chosen, rejected)."""
        check_pairs(x.numel())
        chosen, rejected = x.view(-1, 2).unbind(1)
        return chosen, rejected

    def units(self, unit: Unit) -> int:
        """U, how many numbers a loss of this unit returns."""
        T, S = self.target.numel(), self.lengths.numel()
        if unit == "pair":
            check_pairs(S)
        return {"token": T, "sequence": S, "pair": S // 2, "batch": 1}[unit]

    def kept_units(self, unit: Unit) -> Tensor:  # (U,) bool
        """Which units have a token left, for a batch from which the ignored ones are gone."""
        if unit == "token":
            return torch.ones_like(self.target, dtype=torch.bool)
        left = self.counts > 0
        if unit == "pair":
            chosen, rejected = self.pairs(left)
            return chosen | rejected
        return left if unit == "sequence" else left.any().reshape(1)

    def _each(self, names: Sequence[str], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The fields of these names that are given, changed."""
        return {name: change(getattr(self, name)) for name in names if getattr(self, name) is not None}

    def _of_kept(self, lengths: Tensor, cut: dict[str, Tensor]) -> Batch:
        """Other positions. The weight, which belongs to units, is not carried, and all positions are kept ones."""
        return replace(self, **cut, lengths=lengths, weight=None, kept=None, kept_lengths=None)

    def at(self, rows: Tensor, lengths: Tensor | None = None) -> Batch:  # (N,) ascending positions, (S,)
        """The same sequences with only these positions left in them: `lengths` of each, where they were counted."""
        if len(rows) == self.target.numel():
            return self._of_kept(self.lengths if lengths is None else lengths, {})
        if lengths is None and self.kept is not None and len(rows) == len(self.kept):
            lengths = self.kept_lengths
        if lengths is None:
            lengths = torch.zeros_like(self.lengths, device=rows.device).index_add(
                0, self.sequence.index_select(0, rows), torch.ones_like(rows, dtype=self.lengths.dtype)
            )
        return self._of_kept(lengths, self._each(("target", *PER_TOKEN), lambda x: x.index_select(0, rows)))

    def tokens(self, rows: slice) -> Batch:
        """The same sequences with only these of their positions, for a loss of tokens."""
        ends = torch.cumsum(self.lengths, 0)
        lengths = ends.clamp(rows.start, rows.stop) - (ends - self.lengths).clamp(rows.start, rows.stop)
        return self._of_kept(lengths, self._each(("target", *PER_TOKEN), lambda x: x[rows]))

    def slice(self, first: int, last: int, start: int, stop: int) -> Batch:
        """Sequences first..last, which are positions start..stop: whole ones, so that every field keeps its meaning."""
        cut = self._each(("target", *PER_TOKEN), lambda x: x[start:stop])
        cut |= self._each(PER_SEQUENCE, lambda x: x[first:last])
        cut |= self._each(PER_PAIR, lambda x: x[first // 2 : last // 2])
        return self._of_kept(self.lengths[first:last], cut)

    def blank(self, mask: Tensor) -> Batch:  # (T,) bool
        """Zeros in every per-token field where mask is false, so that nothing found there can reach a sum."""
        return replace(self, **self._each(PER_TOKEN, lambda x: torch.where(mask, x, torch.zeros_like(x))))

    def to(self, device: torch.device | str) -> Batch:
        """Every tensor on `device`, but for the lengths: they are read on the host."""
        names = [field.name for field in fields(self) if "lengths" not in field.name]
        ahead = torch.device(device).type == "cuda"  # a copy back to the host must be waited for
        return replace(self, **self._each(names, lambda x: x.to(device, non_blocking=ahead)))
