"""Metrics of preferences: of pairs, of sequences with a label, and of a reward model's scores."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.metrics.parts import Part, largest, mean, mean_difference, smallest
from fastpost.metrics.tokens import kept
from fastpost.types import Batch, Stats


def preference(stats: Stats, batch: Batch, *, beta: float = 0.1, average: bool = False) -> dict[str, Part]:
    """TRL's of DPO, CPO and ORPO, over pairs:

    rewards/{chosen,rejected}   beta (logp - ref_logp) of the sequence; beta logp where there is no reference
    rewards/accuracies          the share of pairs in which the chosen reward is the larger
    rewards/margins             chosen less rejected
    logps/{chosen,rejected}     of the sequence
    logits/{chosen,rejected}    the mean of a token's logits: mean_logp + lse, if both were computed; over tokens
    entropy                     if it was computed; over tokens
    mean_token_accuracy         of chosen tokens, if top1 was computed

    average: per token, as SimPO and ORPO count.
    """
    logp, ratio, there = _sequences(stats, batch, average)
    whole, first = _whole(batch, there), _first(batch)
    chosen, rejected = batch.pairs(beta * ratio)
    parts = {
        "rewards/chosen": mean(chosen, whole),
        "rewards/rejected": mean(rejected, whole),
        "rewards/accuracies": mean(chosen > rejected, whole),
        "rewards/margins": mean(chosen - rejected, whole),
    }
    for name, x in zip(("chosen", "rejected"), batch.pairs(logp), strict=True):
        parts[f"logps/{name}"] = mean(x, whole)
    parts |= _of_tokens(stats, batch, first)
    if stats.top1 is not None:
        parts["mean_token_accuracy"] = mean(stats.top1, kept(batch) & batch.spread(first))
    return parts


def displacement(stats: Stats, batch: Batch) -> dict[str, Part]:
    """displacement/chosen_falling: the share of pairs whose chosen sequence is less likely than under the reference;
    displacement/both_falling: whose rejected one is, too. Likelihood displacement (arXiv:2410.08847): the margin grows
    while both fall, and the probability goes to answers that are in no pair, be they the opposite of the chosen one."""
    if batch.ref_logp is None:
        raise ValueError("displacement needs batch.ref_logp, which is None")
    _, ratio, there = _sequences(stats, batch, False)
    chosen, rejected = batch.pairs(ratio)
    return {
        "displacement/chosen_falling": mean(chosen < 0, _whole(batch, there)),
        "displacement/both_falling": mean((chosen < 0) & (rejected < 0), _whole(batch, there)),
    }


def kto(stats: Stats, batch: Batch, *, beta: float = 0.1) -> dict[str, Part]:
    """TRL's of KTO: rewards, logps and logits as in `preference`, chosen where batch.label and rejected elsewhere;
    rewards/margins is the difference of the two means; kl is batch.kl, the mean over microbatches."""
    if batch.label is None:
        raise ValueError("kto needs batch.label, which is None")
    logp, ratio, there = _sequences(stats, batch, False)
    good, bad = there & batch.label, there & ~batch.label
    parts = {
        "rewards/chosen": mean(beta * ratio, good),
        "rewards/rejected": mean(beta * ratio, bad),
        "rewards/margins": mean_difference(beta * ratio, good, bad),
        "logps/chosen": mean(logp, good),
        "logps/rejected": mean(logp, bad),
    }
    parts |= _of_tokens(stats, batch, batch.label)
    return parts if batch.kl is None else parts | {"kl": mean(batch.kl)}


def reward(scores: Tensor) -> dict[str, Part]:  # (S,), chosen and rejected in turns
    """TRL's of a reward model: min_reward, mean_reward, max_reward over sequences, accuracy and margin over pairs."""
    if scores.ndim != 1 or len(scores) % 2:
        raise ValueError(f"scores must be (S,), chosen and rejected in turns, got {tuple(scores.shape)}")
    chosen, rejected = Batch.pairs(scores)
    return {
        "min_reward": smallest(scores),
        "mean_reward": mean(scores),
        "max_reward": largest(scores),
        "accuracy": mean(chosen > rejected),
        "margin": mean(chosen - rejected),
    }


def length_bias(scores: Tensor, lengths: Tensor) -> dict[str, Part]:  # (S,), (S,) chosen and rejected in turns
    """Whether a reward model goes by length: its accuracy where the chosen answer is the longer one and where it is the
    shorter, and the share of pairs in which the longer answer has the higher score; pairs of equal length aside."""
    chosen, rejected = Batch.pairs(scores)
    longer, shorter = (torch.gt(*pair) for pair in (Batch.pairs(lengths), Batch.pairs(-lengths)))
    right = chosen > rejected
    return {
        "accuracy/longer_chosen": mean(right, longer),
        "accuracy/shorter_chosen": mean(right, shorter),
        "longer_preferred": mean(right == longer, longer | shorter),
    }


def _sequences(stats: Stats, batch: Batch, average: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(S,) logp, (S,) logp - ref_logp, and (S,) bool: there is a token in it."""
    at = kept(batch)
    count = batch.per_sequence(at.to(stats.logp.dtype))
    over = count.clamp(min=1) if average else 1
    logp = batch.per_sequence(torch.where(at, stats.logp, 0.0)) / over
    if batch.ref_logp is None:
        return logp, logp, count > 0
    return logp, batch.per_sequence(torch.where(at, stats.logp - batch.ref_logp, 0.0)) / over, count > 0


def _whole(batch: Batch, there: Tensor) -> Tensor:  # (S,) bool -> (S / 2,) bool
    """Pairs with a token left in them; the others are ignored by every loss."""
    chosen, rejected = batch.pairs(there)
    return chosen | rejected


def _first(batch: Batch) -> Tensor:  # (S,) bool
    """Which sequences are the chosen ones."""
    batch.units("pair")
    return torch.arange(batch.lengths.numel(), device=batch.target.device) % 2 == 0


def _of_tokens(stats: Stats, batch: Batch, good: Tensor) -> dict[str, Part]:
    """logits/* and entropy, where what they are made of was computed."""
    at, good = kept(batch), batch.spread(good)
    parts = {} if stats.entropy is None else {"entropy": mean(stats.entropy, at)}
    if stats.mean_logp is None or stats.lse is None:
        return parts
    logits = stats.mean_logp + stats.lse
    return parts | {"logits/chosen": mean(logits, at & good), "logits/rejected": mean(logits, at & ~good)}
