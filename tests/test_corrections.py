"""Factors of the advantage: against float64 loops written from the papers, and against TRL's own methods."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastpost.advantages import entropy_threshold, off_policy_mask, rollout_correction, top_entropy
from fastpost.types import Batch

LENGTHS = (4, 1, 6, 3, 2)
NAN = math.nan
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def batch_of(hidden: tuple[int, ...] = (0, 4, 5, 10, 13)) -> Batch:
    """Sequences of LENGTHS; nothing is predicted at `hidden`, which is all of the second sequence."""
    target = torch.full((sum(LENGTHS),), 7)
    target[list(hidden)] = -100
    return Batch(target, torch.tensor(LENGTHS))


def padded(x: Tensor, fill: float = 0.0) -> Tensor:
    """(S, longest), as TRL has it."""
    rows = x.split(LENGTHS)
    return torch.stack([torch.cat([row, row.new_full((max(LENGTHS) - len(row),), fill)]) for row in rows])


def packed(x: Tensor) -> Tensor:
    return torch.cat([row[:n] for row, n in zip(x, LENGTHS, strict=True)])


def logps() -> tuple[Tensor, Tensor]:
    """Of the trainer and of the sampler, far enough apart for every bound to bite; one was not reported."""
    a, b = (-4 * torch.rand(2, sum(LENGTHS), dtype=torch.float64)).unbind()
    b = torch.where(torch.arange(sum(LENGTHS)) == 7, NAN, b)
    return a, b


@pytest.mark.parametrize("bounds", [(3.0, None), (1.5, 0.6), (None, 0.6)])
@pytest.mark.parametrize("mode", MODES)
def test_the_weight_of_a_rollout_by_its_definition(mode: str, bounds: tuple[float | None, float | None]):
    batch, (old, rollout), (high, low) = batch_of(), logps(), bounds
    want, start = [], 0
    for n in LENGTHS:
        at = range(start, start + n)
        d = [float(old[t] - rollout[t]) if batch.target[t] != -100 and t != 7 else 0.0 for t in at]
        for w in (math.exp(sum(d)) if mode.startswith("sequence") else math.exp(x) for x in d):
            inside = (low is None or w >= low) and (high is None or w <= high)
            clamped = min(max(w, low or 0.0), high or math.inf)
            want.append(clamped if mode.endswith("truncate") else w * inside)
        start += n
    got = rollout_correction(old, rollout, batch, mode, high, low)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    assert got[7] == 1 or mode.startswith("sequence")
    assert len(set(want)) > 1 and (0.0 in want or mode.endswith("truncate"))


@pytest.mark.parametrize("mode", MODES)
def test_a_sampler_that_is_the_policy_weighs_1_and_one_that_says_nothing_too(mode: str):
    old, _ = logps()
    assert rollout_correction(old, old, batch_of(), mode).eq(1).all()
    assert rollout_correction(old, torch.full_like(old, NAN), batch_of(), mode).eq(1).all()


def test_what_is_ignored_does_not_weigh():
    batch, (old, rollout) = batch_of(), logps()
    noise = torch.where(batch.target == -100, -1000.0, 0.0)
    for mode in MODES:
        got = rollout_correction(old + noise, rollout, batch, mode)
        assert torch.equal(got, rollout_correction(old, rollout, batch, mode))


def test_a_token_that_the_sampler_held_impossible_does_not_overflow():
    batch, (old, rollout) = batch_of(), logps()
    rollout[2] = -math.inf
    assert rollout_correction(old, rollout, batch, "token_truncate")[2] == 3
    assert rollout_correction(old, rollout, batch, "token_mask")[2] == 0
    assert not rollout_correction(old, rollout, batch, "sequence_mask")[:4].any()


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.4])
def test_the_off_policy_mask_is_trls(threshold: float):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    batch, (logp, rollout) = batch_of(), logps()
    rollout = rollout + 0.2
    sequence = torch.tensor([-1.0, -1.0, -2.0, 1.0, -0.5], dtype=torch.float64)
    mask = padded((batch.target != -100).double())
    want = trainer.get_off_policy_mask(sequence[:, None], padded(logp), padded(rollout), mask, threshold)
    got = off_policy_mask(batch.spread(sequence), logp, rollout, batch, threshold)
    assert torch.equal(got, batch.spread(want[:, 0].bool()))


def test_the_off_policy_mask_by_hand():
    batch = batch_of(hidden=(4,))
    advantage = batch.spread(torch.tensor([-1.0, -1.0, -1.0, 1.0, 0.0]))
    drift = batch.spread(torch.tensor([0.4, 9.0, 0.6, 9.0, 9.0]))
    got = off_policy_mask(advantage, -1 - drift, torch.full((16,), -1.0), batch, 0.5)
    assert batch.per_sequence(got.float()).tolist() == [4, 1, 0, 3, 2]  # the second has no token and no drift


@pytest.mark.parametrize("quantile", [0.0, 0.2, 0.5, 0.77, 1.0])
def test_the_top_entropy_mask_is_trls(quantile: float):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    batch = batch_of()
    entropy, advantage = torch.rand(16), torch.randn(16)
    alone = SimpleNamespace(
        accelerator=SimpleNamespace(pad_across_processes=lambda x, dim, pad_index: x, gather=lambda x: x)
    )
    mask = padded((batch.target != -100).float())
    want = packed(trainer.get_high_entropy_mask(alone, padded(entropy), mask, 1 - quantile))
    got = top_entropy(advantage, entropy, batch, quantile)
    kept = batch.target != -100
    assert torch.equal(got[kept] != 0, want[kept])
    assert torch.equal(got[kept & want], advantage[kept & want])
    share = quantile * int(kept.sum())
    assert math.floor(share) <= int(want.sum()) <= math.ceil(share) + 1


def test_a_threshold_may_come_from_more_than_this_batch():
    batch, entropy = batch_of(hidden=()), torch.arange(16.0)
    assert top_entropy(torch.ones(16), entropy, batch, threshold=torch.tensor(13.0)).sum() == 3
    assert entropy_threshold(entropy, batch, 0.2) == torch.quantile(entropy, 0.8)


def test_nothing_kept_is_nothing_to_correct():
    batch = batch_of(tuple(range(16)))
    x = torch.randn(16)
    assert rollout_correction(x, x - 1, batch).eq(1).all()
    assert off_policy_mask(-torch.ones(16), x, x + 9, batch).all()
    assert entropy_threshold(x, batch) == 0


def test_the_gradient_stops_here():
    batch = batch_of()
    old, rollout = (x.requires_grad_() for x in logps())
    advantage = torch.randn(16, dtype=torch.float64)
    assert not rollout_correction(old, rollout, batch).requires_grad
    assert not top_entropy(advantage, old, batch).requires_grad


X = torch.zeros(16)
BAD = [
    (
        lambda b: rollout_correction(X, X, b, "token_mas"),
        r"mode must be one of .*got 'token_mas' \(did you mean 'token_mask",
    ),
    (
        lambda b: rollout_correction(X[1:], X, b),
        r"old_logp must have shape \(16,\) to match 16 positions in 5 sequences",
    ),
    (
        lambda b: rollout_correction(X, X, b, "token_mask", 0.5, 2.0),
        "must be 0 <= clip_min <= clip_max, got 2.0 and 0.5",
    ),
    (lambda b: off_policy_mask(X[:5], X, X, b), r"advantage must have shape \(16,\).*got \(5,\)"),
    (lambda b: top_entropy(X, X[:5], b), r"entropy must have shape \(16,\)"),
    (lambda b: top_entropy(X, X, b, 1.2), r"top_entropy_quantile must be in \[0, 1\], got 1.2"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(batch_of())
