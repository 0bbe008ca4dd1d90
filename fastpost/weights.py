"""Normalisations: what goes into `batch.weight`, one number a unit, so that a step descends a mean over all of it.

A loss is reduced as the sum over kept units of weight * loss, microbatch after microbatch, and DDP and FSDP average
the gradients of W processes. So a weight is W over the count in the whole step, which is a `Window`: every microbatch
of it, on every process, and what was skipped because its coefficient is zero, too. Means of means over microbatches or
processes of unequal size are another objective; only `microbatch_mean`, by its definition, is one.

Let a step have N kept tokens in S sequences, the sequence at hand n of them. A token weighs

  token_mean       W / N        dapo (arXiv:2503.14476), sft: the num_items_in_batch of transformers
  sequence_mean    W / (S n)    grpo (arXiv:2402.03300): sequences weigh the same, their tokens share it
  fixed_length     W / (S L)    dr_grpo (arXiv:2503.20783): L the longest a completion can get, so no length is favoured
  microbatch_mean  1 / (M n_m)  bnpo: n_m kept tokens in this microbatch, M microbatches a process and step

and a unit weighs what its tokens weigh together: under sequence_mean a sequence (gspo, rloo, kto) W / S, a pair (dpo)
W / (S / 2) whatever the lengths; under token_mean a sequence W n / N. That is for losses that are means over their
tokens; where one is their sum already (vespo), `token_mean_of_sums` gives each unit W / N.

The numbers are laid out for any unit, on the device of batch.target, in fp32, with no transfer to wait for. Ignored
units get one too, which nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpost.types import IGNORE, Batch, Unit

Count = int | Tensor  # a 0-dim tensor where it was reduced on an accelerator


@dataclass(frozen=True)
class Window:
    """What one optimizer step is about: its counts over all microbatches of all processes."""

    tokens: Count  # kept
    sequences: Count
    world_size: int = 1

    def __post_init__(self):
        for name in ("tokens", "sequences"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"window.{name} must be one number, got a tensor of shape {tuple(value.shape)}")
            if not isinstance(value, Tensor) and value < 0:
                raise ValueError(f"window.{name} must not be negative, got {value}")
        if self.world_size < 1:
            raise ValueError(f"window.world_size must be at least 1, got {self.world_size}")

    @staticmethod
    def of(*batches: Batch) -> Window:
        """The window of these microbatches and this process alone."""
        if not batches:
            raise ValueError("batches must be one microbatch or more, got none")
        tokens = sum(_counts(batch).sum() for batch in batches)
        return Window(tokens, sum(batch.lengths.numel() for batch in batches))

    def over_ranks(self, device: torch.device | str = "cpu") -> Window:
        """The sum over the processes of torch.distributed, and how many there are; itself where there is one.

        `device` is where the backend wants its tensors: "cuda" for NCCL.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        counts = torch.stack([torch.as_tensor(n, device=device) for n in (self.tokens, self.sequences)])
        torch.distributed.all_reduce(counts)
        return Window(*counts.unbind(), world_size=torch.distributed.get_world_size())


def token_mean(batch: Batch, window: Window | None = None, unit: Unit = "token") -> Tensor:  # (U,)
    """Each token W / N: the mean over all tokens of the step. window None: of this batch alone."""
    window = window or Window.of(batch)
    return _over_units(batch, window.world_size / _of(batch, window.tokens), unit)


def token_mean_of_sums(batch: Batch, window: Window | None = None, unit: Unit = "sequence") -> Tensor:  # (U,)
    """Each unit W / N: the mean over all tokens of the step, for a loss that adds up those of its unit."""
    window = window or Window.of(batch)
    return (window.world_size / _of(batch, window.tokens)).expand(batch.units(unit))


def sequence_mean(batch: Batch, window: Window | None = None, unit: Unit = "token") -> Tensor:  # (U,)
    """Each sequence W / S, shared out evenly among its tokens: the mean over sequences, or over pairs."""
    window = window or Window.of(batch)
    sequences = _of(batch, window.sequences)
    if unit == "token":
        return window.world_size / (sequences * batch.spread(_counts(batch).clamp(min=1)))
    together = {"sequence": 1, "pair": 2, "batch": batch.lengths.numel()}[unit]
    return (window.world_size * together / sequences).expand(batch.units(unit))


def fixed_length(
    batch: Batch, max_completion_length: int, window: Window | None = None, unit: Unit = "token"
) -> Tensor:  # (U,)
    """Each token W / (S L), L = max_completion_length: the sum over a sequence, whatever its length, by a constant."""
    if max_completion_length < 1:
        raise ValueError(f"max_completion_length must be at least 1, got {max_completion_length}")
    window = window or Window.of(batch)
    return _over_units(batch, window.world_size / (_of(batch, window.sequences) * max_completion_length), unit)


def microbatch_mean(batch: Batch, microbatches: int = 1, unit: Unit = "token") -> Tensor:  # (U,)
    """Each token 1 / (M n_m): the mean over M microbatches, and over processes, of the mean over tokens in each.

    How a step is cut into microbatches changes it, which is why `token_mean` is the better choice.
    """
    if microbatches < 1:
        raise ValueError(f"microbatches must be at least 1, got {microbatches}")
    return _over_units(batch, 1 / (_of(batch, _counts(batch).sum()) * microbatches), unit)


def total(batch: Batch, window: Window | None = None, unit: Unit = "token") -> Tensor:  # (U,)
    """Each unit W, whatever it is: the sum over the step."""
    W = window.world_size if window else 1
    return torch.ones((), device=batch.target.device).mul(W).expand(batch.units(unit))


# By the methods' own names.
dapo, grpo, dr_grpo, bnpo, vespo = token_mean, sequence_mean, fixed_length, microbatch_mean, token_mean_of_sums


def _counts(batch: Batch) -> Tensor:  # (S,)
    """Kept tokens of each sequence, beside the target."""
    if batch.kept_lengths is not None:
        return batch.kept_lengths.to(batch.target.device, non_blocking=True)
    return batch.per_sequence((batch.target != IGNORE).long())


def _of(batch: Batch, count: Count) -> Tensor:  # ()
    """The count beside the target, and not zero: where there is nothing, nothing is weighed."""
    return torch.as_tensor(count, device=batch.target.device).clamp(min=1)


def _over_units(batch: Batch, share: Tensor, unit: Unit) -> Tensor:  # () -> (U,)
    """What each unit weighs where every token weighs the same."""
    U = batch.units(unit)
    if unit == "token":
        return share.expand(U)
    return share * _counts(batch).view(U, -1).sum(1)
