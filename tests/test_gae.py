"""Rewards and advantages of tokens against float64 loops over one sequence at a time, written from the papers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastpost.advantages import gae, kl_in_reward, reinforce_plus_plus, reward_to_go, whiten
from fastpost.packing import Example, pack
from fastpost.types import Batch
from rules import assert_close_to_truth

# Prompts and completions: of one token, of none, of many; t is what a tool wrote.
MASKS = ["ppc", "pp", "p" + "c" * 37, "pppccttcct", "pccccc", "pt", "pc"]


def batch_of(masks: list[str] = MASKS, host: bool = True) -> Batch:
    """c: a token of the completion. Without `host` nothing is known but the target, as of tensors on an accelerator."""
    batch = pack([Example([7] * len(mask), [m == "c" for m in mask]) for mask in masks]).batch
    return batch if host else Batch(batch.target, batch.lengths)


def episodes(batch: Batch) -> list[list[int]]:
    """The kept positions of each sequence."""
    starts = [0, *batch.lengths.cumsum(0).tolist()]
    return [[t for t in range(a, b) if batch.target[t] != -100] for a, b in itertools.pairwise(starts)]


def loop(rewards: Tensor, values: Tensor, batch: Batch, gamma: float, lam: float, truncated: Tensor | None) -> Tensor:
    """A by its definition: the sum over all later steps, in the dtype of the arguments."""
    advantage = torch.zeros_like(values)
    for s, steps in enumerate(episodes(batch)):
        delta = []
        for t, then in zip(steps, [*steps[1:], None], strict=False):
            if then is not None:
                next_value = values[then]
            else:
                next_value = values[t + 1] if truncated is not None and truncated[s] else torch.zeros_like(values[0])
            delta.append(rewards[t] + gamma * next_value - values[t])
        for i, t in enumerate(steps):
            advantage[t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(steps)))
    return advantage


def draw(batch: Batch, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    T = batch.target.numel()
    return torch.randn(T, dtype=dtype), torch.randn(T, dtype=dtype)


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0), (0.0, 1.0)])
def test_gae_is_a_loop_over_each_sequence(gamma: float, lam: float, cut: bool, host: bool):
    batch = batch_of(host=host)
    rewards, values = draw(batch)
    truncated = torch.tensor([True, True, True, False, True, True, False]) if cut else None
    advantage, return_ = gae(rewards, values, batch, gamma, lam, truncated)
    truth = loop(rewards.double(), values.double(), batch, gamma, lam, truncated)
    same = loop(rewards, values, batch, gamma, lam, truncated)
    assert_close_to_truth(advantage, same, truth)
    kept = batch.target != -100
    assert_close_to_truth(return_, same + values * kept, truth + values.double() * kept)
    assert not advantage[~kept].any() and not return_[~kept].any()


def test_gae_in_float64_is_exact_at_any_length():
    batch = batch_of(["p" + "c" * n for n in (1, 2, 3, 4, 5, 127, 128, 129)])
    rewards, values = draw(batch, dtype=torch.float64)
    truth = loop(rewards, values, batch, 0.999, 0.98, None)
    once = torch.finfo(torch.float64).eps * float(truth.abs().max())  # what a step may round off
    torch.testing.assert_close(gae(rewards, values, batch, 0.999, 0.98)[0], truth, rtol=0, atol=129 * once)


def test_lambda_1_is_the_return_less_the_value_and_lambda_0_the_temporal_difference():
    batch = batch_of()
    rewards, values = draw(batch, dtype=torch.float64)
    kept = batch.target != -100
    advantage, return_ = gae(rewards, values, batch, 0.9, 1.0)
    torch.testing.assert_close(return_, reward_to_go(rewards, batch, 0.9))
    torch.testing.assert_close(advantage, torch.where(kept, reward_to_go(rewards, batch, 0.9) - values, 0.0))
    for steps in episodes(batch):
        then = [values[t] for t in steps[1:]] + [torch.tensor(0.0)]
        for t, value in zip(steps, then, strict=False):
            torch.testing.assert_close(
                gae(rewards, values, batch, 0.9, 0.0)[0][t], rewards[t] + 0.9 * value - values[t]
            )


def test_nothing_crosses_a_boundary():
    """Each sequence alone has the advantages that it has in the pack, to the bit; a NaN next door stays there."""
    together = batch_of()
    rewards, values = draw(together)
    advantage, _ = gae(rewards, values, together, 0.99, 0.9)
    starts = [0, *together.lengths.cumsum(0).tolist()]
    for i, mask in enumerate(MASKS):
        at = slice(starts[i], starts[i + 1])
        assert torch.equal(gae(rewards[at], values[at], batch_of([mask]), 0.99, 0.9)[0], advantage[at])
    rewards[starts[4] : starts[5]] = math.nan
    poisoned, _ = gae(rewards, values, together, 0.99, 0.9)
    assert poisoned.isnan().sum() == 5
    assert torch.equal(poisoned[: starts[4]], advantage[: starts[4]])
    assert torch.equal(poisoned[starts[5] :], advantage[starts[5] :])


def test_what_is_ignored_may_hold_anything():
    batch = batch_of()
    rewards, values = draw(batch)
    want = gae(rewards, values, batch)[0]
    noise = torch.where(batch.target == -100, math.nan, 0.0)
    assert torch.equal(gae(rewards + noise, values + noise, batch)[0], want)


def test_a_critic_in_bfloat16_is_summed_in_fp32():
    batch = batch_of()
    rewards, values = draw(batch)
    advantage, return_ = gae(rewards.bfloat16(), values.bfloat16(), batch)
    assert advantage.dtype == return_.dtype == torch.float32
    assert torch.equal(advantage, gae(rewards.bfloat16().float(), values.bfloat16().float(), batch)[0])


def test_a_batch_in_which_nothing_is_kept():
    batch = batch_of(["pp", "p"])
    assert not any(x.any() for x in gae(torch.randn(3), torch.randn(3), batch))
    assert not reinforce_plus_plus(torch.randn(3), batch).any()
    assert not kl_in_reward(torch.ones(2), torch.randn(3), torch.randn(3), batch).any()


def test_a_sequence_that_is_kept_to_its_last_position_has_nothing_behind_it():
    batch = Batch(torch.tensor([5, 6, 7, 8]), torch.tensor([2, 2]))
    values = torch.tensor([1.0, 2.0, 30.0, 4.0])
    advantage, _ = gae(torch.zeros(4), values, batch, 1.0, 0.0, torch.tensor([True, True]))
    assert advantage.tolist() == [1.0, -2.0, -26.0, -4.0]


# ---- rewards ----


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_is_paid_at_each_token_and_the_score_at_the_last(estimator: str):
    batch = batch_of()
    logp, ref_logp = (-torch.rand(2, batch.target.numel(), dtype=torch.float64)).unbind()
    score = torch.randn(len(MASKS), dtype=torch.float64)
    score[4] = math.nan
    want = torch.zeros_like(logp)
    for s, steps in enumerate(episodes(batch)):
        for t in steps:
            d = float(ref_logp[t] - logp[t])
            want[t] = -0.3 * {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[estimator]
        if steps and s != 4:
            want[steps[-1]] += score[s]
    torch.testing.assert_close(kl_in_reward(score, logp, ref_logp, batch, 0.3, estimator), want)


def test_with_k1_the_rewards_of_a_sequence_add_up_to_its_score_less_its_kl():
    batch = batch_of()
    logp, ref_logp = (-torch.rand(2, batch.target.numel(), dtype=torch.float64)).unbind()
    kept = batch.target != -100
    score = torch.randn(len(MASKS), dtype=torch.float64)
    total = batch.per_sequence(kl_in_reward(score, logp, ref_logp, batch, 0.3))
    want = score - 0.3 * batch.per_sequence(torch.where(kept, logp - ref_logp, 0.0))
    there = torch.tensor(["c" in mask for mask in MASKS])
    torch.testing.assert_close(total, torch.where(there, want, 0.0))


def test_reinforce_plus_plus_is_the_whitened_reward_to_go():
    batch = batch_of()
    rewards = torch.randn(batch.target.numel(), dtype=torch.float64)
    to_go = torch.zeros_like(rewards)
    for steps in episodes(batch):
        for i, t in enumerate(steps):
            to_go[t] = sum(0.9**j * rewards[u] for j, u in enumerate(steps[i:]))
    torch.testing.assert_close(reward_to_go(rewards, batch, 0.9), to_go)
    kept = batch.target != -100
    want = (to_go - to_go[kept].mean()) / to_go[kept].std()
    torch.testing.assert_close(reinforce_plus_plus(rewards, batch, 0.9), torch.where(kept, want, 0.0))


def test_whitening_by_hand():
    x, mask = torch.tensor([1.0, 2.0, 100.0, 3.0]), torch.tensor([True, True, False, True])
    torch.testing.assert_close(whiten(x, mask), torch.tensor([-1.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(whiten(x, mask, shift_mean=False), torch.tensor([1.0, 2.0, 0.0, 3.0]))
    y = torch.randn(50, dtype=torch.float64)
    torch.testing.assert_close(whiten(y), (y - y.mean()) / (y.var() + 1e-8).sqrt())
    torch.testing.assert_close(whiten(3 * y + 7), whiten(y))


@pytest.mark.parametrize("x", [[0.1] * 7, [0.3], []])
def test_whitening_without_variance_is_zero_to_the_bit(x: list[float]):
    assert not whiten(torch.tensor(x)).any()
    assert torch.allclose(whiten(torch.tensor(x), shift_mean=False), torch.tensor(x))


def test_whitening_ignores_what_the_mask_hides():
    mask = torch.tensor([True, False, True, True])
    hidden = torch.tensor([1.0, math.nan, 4.0, 5.0])
    assert torch.equal(whiten(hidden, mask), whiten(hidden.nan_to_num(7.0), mask))


T, S = sum(map(len, MASKS)), len(MASKS)
BAD = [
    (lambda b, x: gae(x[1:], x, b), rf"rewards must have shape \({T},\) to match {T} positions in {S} sequences"),
    (lambda b, x: gae(x, x[:, None], b), rf"values must have shape \({T},\).*got \({T}, 1\)"),
    (lambda b, x: gae(x, x, b, 1.1), r"gamma must be in \[0, 1\], got 1.1"),
    (lambda b, x: gae(x, x, b, 1.0, -0.1), r"lam must be in \[0, 1\], got -0.1"),
    (lambda b, x: gae(x, x, b, truncated=torch.ones(S)), "truncated must be bool.*got torch.float32"),
    (
        lambda b, x: gae(x, x, b, truncated=torch.ones(3, dtype=torch.bool)),
        rf"truncated must have shape \({S},\).*\(3,\)",
    ),
    (lambda b, x: reward_to_go(x[1:], b), "rewards must have shape"),
    (lambda b, x: kl_in_reward(x, x, x, b), rf"score must have shape \({S},\).*got \({T},\)"),
    (lambda b, x: kl_in_reward(torch.ones(S), x, x[1:], b), "ref_logp must have shape"),
    (lambda b, x: kl_in_reward(torch.tensor([1.0] * 6 + [math.inf]), x, x, b), "score must be finite.*inf at index 6"),
    (
        lambda b, x: kl_in_reward(torch.ones(S), x, x, b, kl_estimator="k4"),
        "kl_estimator must be one of 'k1', 'k2', 'k3'",
    ),
    (lambda b, x: whiten(x, torch.ones(T)), "mask must be bool of the shape of values"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message: str):
    batch = batch_of()
    with pytest.raises(ValueError, match=message):
        call(batch, torch.zeros(batch.target.numel()))
