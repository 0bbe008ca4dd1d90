"""Metrics: by their definitions in float64 loops, and TRL's own lines."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from statistics import correlation, fmean, variance

import pytest
import torch
from torch import Tensor

from fastpost import losses, metrics
from fastpost.advantages import rollout_correction
from fastpost.types import Batch, Stats

COUNTS = (3, 1, 0, 5, 2, 4, 0, 0)  # kept tokens; the third completion is empty, and so is the whole last pair
LENGTHS = tuple(n + 2 for n in COUNTS)
PER_TOKEN = ("old_logp", "ref_logp", "rollout_logp", "advantage", "old_value", "return_")
ROUNDED = 1000 * torch.finfo(torch.float64).eps  # a few hundred sums and products of numbers of order one


def batch_of() -> Batch:
    target = torch.cat([torch.tensor([-100] + [7] * n + [-100]) for n in COUNTS])
    T = len(target)
    given = {name: -torch.rand(T, dtype=torch.float64) for name in PER_TOKEN} | {
        "advantage": torch.randn(T, dtype=torch.float64),
        "label": torch.tensor([True, False, True, True, False, False, True, False]),
        "kl": torch.tensor(0.3),
    }
    given["rollout_logp"][[2, 13]] = math.nan
    given["old_logp"] = torch.where(target == -100, math.nan, given["old_logp"])  # what is ignored may hold anything
    return Batch(target, torch.tensor(LENGTHS), **given)


def stats_of(batch: Batch) -> Stats:
    names = [field.name for field in fields(Stats) if field.name not in ("top1", "reverse_kl")]
    T = batch.target.numel()
    noise = torch.where(batch.target == -100, math.nan, 0.0)
    given = {name: -2 * torch.rand(T, dtype=torch.float64) + noise for name in names}
    return Stats(**(given | {"entropy": -given["entropy"], "top1": torch.rand(T) < 0.4}))


def tokens(x: Tensor, batch: Batch) -> list[list[float]]:
    """Of the kept tokens of each sequence."""
    rows, kept = x.double().split(LENGTHS), (batch.target != -100).split(LENGTHS)
    return [row[k].tolist() for row, k in zip(rows, kept, strict=True)]


def flat(x: Tensor, batch: Batch) -> list[float]:
    return [value for row in tokens(x, batch) for value in row]


def got(seen: dict[str, metrics.Part]) -> dict[str, float]:
    values = metrics.values(seen)
    assert all(value.shape == () and value.dtype == torch.float64 for value in values.values())
    assert not any(value.requires_grad for value in values.values())
    return {name: float(value) for name, value in values.items()}


def near(want: dict[str, float]) -> object:
    return pytest.approx(want, rel=ROUNDED, abs=ROUNDED, nan_ok=True)


# ---- each family, by its definition ----


def test_sft():
    batch = batch_of()
    stats = stats_of(batch)
    want = {"entropy": fmean(flat(stats.entropy, batch)), "mean_token_accuracy": fmean(flat(stats.top1, batch))}
    assert got(metrics.sft(stats, batch)) == near(want)
    assert got(metrics.sft(Stats(logp=stats.logp), batch)) == {}
    assert got(metrics.num_tokens(batch)) == {"num_tokens": sum(LENGTHS)}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_preference(average: bool, reference: bool):
    batch = batch_of() if reference else replace(batch_of(), ref_logp=None)
    stats = stats_of(batch)
    over = [max(n, 1) if average else 1 for n in COUNTS]
    logp = [sum(row) / n for row, n in zip(tokens(stats.logp, batch), over, strict=True)][:6]
    ratio = logp
    if reference:
        ratio = [a - sum(row) / n for a, row, n in zip(logp, tokens(batch.ref_logp, batch), over, strict=False)]
    reward = [0.3 * x for x in ratio]
    chosen, rejected = reward[::2], reward[1::2]
    logits = tokens(stats.mean_logp + stats.lse, batch)
    want = {
        "rewards/chosen": fmean(chosen),
        "rewards/rejected": fmean(rejected),
        "rewards/accuracies": fmean(a > b for a, b in zip(chosen, rejected, strict=True)),
        "rewards/margins": fmean(a - b for a, b in zip(chosen, rejected, strict=True)),
        "logps/chosen": fmean(logp[::2]),
        "logps/rejected": fmean(logp[1::2]),
        "entropy": fmean(flat(stats.entropy, batch)),
        "logits/chosen": fmean(x for row in logits[::2] for x in row),
        "logits/rejected": fmean(x for row in logits[1::2] for x in row),
        "mean_token_accuracy": fmean(x for row in tokens(stats.top1, batch)[::2] for x in row),
    }
    assert got(metrics.preference(stats, batch, beta=0.3, average=average)) == near(want)


def test_the_logits_of_a_token_are_what_their_names_say():
    """mean_logp + lse is the mean of the logits, which TRL averages."""
    logits = torch.randn(4, 50, dtype=torch.float64)
    logp = logits.log_softmax(-1)
    stats = Stats(logp=logp[:, 7], mean_logp=logp.mean(-1), lse=logits.logsumexp(-1))
    batch = Batch(torch.tensor([7, 7, 7, 7]), torch.tensor([1, 3]), ref_logp=torch.zeros(4))
    values = got(metrics.preference(stats, batch))
    assert values["logits/chosen"] == pytest.approx(float(logits[0].mean()))
    assert values["logits/rejected"] == pytest.approx(float(logits[1:].mean()))


def test_displacement():
    """Pairs: the chosen one rises; it falls with the rejected one; it falls alone; nothing is in it."""
    change = torch.tensor([0.5, -1.0, -0.1, -2.0, -0.1, 0.3, 9.0, 9.0])
    target = torch.tensor([7] * 6 + [-100] * 2)
    batch = Batch(target, torch.ones(8, dtype=torch.int64), ref_logp=torch.full((8,), -3.0))
    values = got(metrics.displacement(Stats(logp=change - 3), batch))
    assert values == near({"displacement/chosen_falling": 2 / 3, "displacement/both_falling": 1 / 3})


def test_kto():
    batch = batch_of()
    stats = stats_of(batch)
    logp = [sum(row) for row in tokens(stats.logp, batch)]
    ratio = [a - sum(row) for a, row in zip(logp, tokens(batch.ref_logp, batch), strict=True)]
    good = [i for i, label in enumerate(batch.label.tolist()) if label and COUNTS[i]]
    bad = [i for i, label in enumerate(batch.label.tolist()) if not label and COUNTS[i]]
    logits = tokens(stats.mean_logp + stats.lse, batch)
    want = {
        "rewards/chosen": fmean(0.3 * ratio[i] for i in good),
        "rewards/rejected": fmean(0.3 * ratio[i] for i in bad),
        "rewards/margins": fmean(0.3 * ratio[i] for i in good) - fmean(0.3 * ratio[i] for i in bad),
        "logps/chosen": fmean(logp[i] for i in good),
        "logps/rejected": fmean(logp[i] for i in bad),
        "entropy": fmean(flat(stats.entropy, batch)),
        "logits/chosen": fmean(x for i in good for x in logits[i]),
        "logits/rejected": fmean(x for i in bad for x in logits[i]),
        "kl": float(batch.kl),
    }
    assert got(metrics.kto(stats, batch, beta=0.3)) == near(want)


def test_reward():
    scores = torch.tensor([1.0, 0.0, -2.0, 3.0, 5.0, 4.5])
    want = {"min_reward": -2, "mean_reward": 11.5 / 6, "max_reward": 5, "accuracy": 2 / 3, "margin": -3.5 / 3}
    assert got(metrics.reward(scores)) == near(want)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_policy(level: str):
    batch = batch_of()
    stats = stats_of(batch)
    drift = batch.spread(torch.tensor([0.5, 0.2, 0.0, -0.5, 0.2, 0.5, 0.0, 0.0])) + 0.1 * torch.rand(
        batch.target.numel()
    )
    batch = replace(batch, old_logp=stats.logp - drift)
    log_ratio = tokens(stats.logp - batch.old_logp, batch)
    if level == "sequence":
        log_ratio = [[fmean(row)] * len(row) if row else [] for row in log_ratio]
    ratio = [[math.exp(x) for x in row] for row in log_ratio]
    A = tokens(batch.advantage, batch)
    clip = lambda f: [[float(f(r, a)) for r, a in zip(*pair, strict=True)] for pair in zip(ratio, A, strict=True)]  # noqa: E731
    low, high = clip(lambda r, a: r < 0.9 and a < 0), clip(lambda r, a: r > 1.5 and a > 0)
    mean = lambda rows: fmean(x for row in rows for x in row)  # noqa: E731
    d = [b - a for a, b in zip(flat(stats.logp, batch), flat(batch.ref_logp, batch), strict=True)]
    want = {
        "entropy": fmean(flat(stats.entropy, batch)),
        "clip_ratio/low_mean": mean(low),
        "clip_ratio/high_mean": mean(high),
        "clip_ratio/region_mean": mean(low) + mean(high),
        "kl": fmean(math.exp(x) - 1 - x for x in d),
    }
    knobs = {"epsilon": 0.1, "epsilon_high": 0.5, "importance_sampling_level": level}
    assert got(metrics.policy(stats, batch, **knobs)) == near(want)
    assert want["clip_ratio/low_mean"] > 0 and 0 < mean(high) < mean(clip(lambda r, a: r > 1.1 and a > 0))
    share = lambda rows: [fmean(row) for row in rows if row]  # noqa: E731
    extremes = {"clip_ratio/low_min": min(share(low)), "clip_ratio/high_max": max(share(high))}
    assert got(metrics.clip_extremes(stats, batch, **knobs)) == near(extremes)
    exact = replace(stats, reverse_kl=torch.full_like(stats.logp, 0.125))
    assert got(metrics.policy(exact, batch))["kl"] == 0.125


def test_on_policy_nothing_is_clipped():
    batch = replace(batch_of(), old_logp=None)
    assert got(metrics.policy(stats_of(batch), batch))["clip_ratio/region_mean"] == 0


def test_tokens_without_a_gradient_count_among_those_not_clipped():
    batch = batch_of()
    stats = stats_of(batch)
    seen = metrics.policy(stats, batch)
    with_them = got(metrics.joined(seen, metrics.unclipped(45)))
    assert with_them["clip_ratio/low_mean"] == pytest.approx(got(seen)["clip_ratio/low_mean"] * 15 / 60)
    assert with_them["entropy"] == got(seen)["entropy"]


def test_the_kl_budget_of_a_token_and_of_a_sequence():
    batch = batch_of()
    stats = stats_of(batch)
    spent = tokens(stats.logp - batch.ref_logp, batch)
    want = {"kl_budget/token": sum(map(sum, spent)) / 15, "kl_budget/sequence": sum(map(sum, spent)) / 5}
    assert got(metrics.kl_budget(stats, batch)) == near(want)
    exact = replace(stats, reverse_kl=torch.full_like(stats.logp, 0.5))
    assert got(metrics.kl_budget(exact, replace(batch, ref_logp=None))) == near(
        {"kl_budget/token": 0.5, "kl_budget/sequence": 0.5 * 15 / 5}
    )


def test_the_signs_of_a_collapsing_entropy():
    batch = batch_of()
    stats = stats_of(batch)
    p, a = flat(stats.logp, batch), flat(batch.advantage, batch)
    want = {
        "entropy/low_fraction": fmean(x < 0.7 for x in flat(stats.entropy, batch)),
        "entropy/covariance": fmean((x - fmean(p)) * (y - fmean(a)) for x, y in zip(p, a, strict=True)),
    }
    assert got(metrics.entropy_collapse(stats, batch, low=0.7)) == near(want)


def test_the_covariance_says_how_entropy_moves():
    """One softmax, one exact step of policy gradient on its logits: dH = -eta Cov(log p, p A) to first order, so the
    sign of the metric is that of the loss of entropy (arXiv:2505.22617, lemma 1)."""
    logits = torch.randn(30, dtype=torch.float64)
    for sign in (1, -1):
        p = logits.softmax(0)
        A = sign * (p.log() - (p * p.log()).sum())
        after = (logits + 1e-4 * p * (A - (p * A).sum())).softmax(0)
        fall = (after * after.log()).sum() - (p * p.log()).sum()
        drawn = torch.multinomial(p, 20_000, replacement=True)
        batch = Batch(torch.full((20_000,), 7), torch.tensor([20_000]), advantage=A[drawn])
        value = got(metrics.entropy_collapse(Stats(logp=p.log()[drawn]), batch))["entropy/covariance"]
        assert value * sign > 0 and float(fall) * sign > 0


@pytest.mark.parametrize("of_sequences", [False, True])
def test_sampling(of_sequences: bool):
    batch = batch_of()
    mode = "sequence_truncate" if of_sequences else "token_truncate"
    weight = rollout_correction(batch.old_logp, batch.rollout_logp, batch, mode, clip_max=1.5)
    apart = [abs(x) for x in flat(batch.old_logp - batch.rollout_logp, batch) if not math.isnan(x)]
    w = [row[0] for row in tokens(weight, batch) if row] if of_sequences else flat(weight, batch)
    want = {
        "sampling/sampling_logp_difference/mean": fmean(apart),
        "sampling/sampling_logp_difference/max": max(apart),
        "sampling/importance_sampling_ratio/min": min(w),
        "sampling/importance_sampling_ratio/mean": fmean(w),
        "sampling/importance_sampling_ratio/max": max(w),
    }
    assert len(apart) == 13
    found = metrics.sampler_difference(batch) | metrics.importance_ratio(batch, weight, of_sequences=of_sequences)
    assert got(found) == near(want)


def test_completions():
    lengths, finished = torch.tensor([3, 9, 5, 9]), torch.tensor([True, False, True, False])
    want = {"mean_length": 6.5, "min_length": 3, "max_length": 9, "clipped_ratio": 0.5}
    want |= {"mean_terminated_length": 4, "min_terminated_length": 3, "max_terminated_length": 5}
    assert got(metrics.completions(lengths, finished)) == near({f"completions/{k}": v for k, v in want.items()})
    none = got(metrics.completions(lengths, torch.zeros(4, dtype=torch.bool)))
    assert none["completions/clipped_ratio"] == 1
    assert all(math.isnan(none[f"completions/{k}_terminated_length"]) for k in ("mean", "min", "max"))


def test_the_reward_of_length():
    rewards, lengths = torch.randn(20, dtype=torch.float64), torch.randint(1, 500, (20,))
    rewards[3] = math.nan
    rest = [i for i in range(20) if i != 3]
    want = correlation(rewards[rest].tolist(), lengths[rest].tolist())
    assert got(metrics.length_correlation(rewards, lengths)) == near({"reward_length_correlation": want})
    assert got(metrics.length_correlation(lengths / 7, lengths))["reward_length_correlation"] == pytest.approx(1)
    assert math.isnan(got(metrics.length_correlation(torch.ones(20), lengths))["reward_length_correlation"])


def test_ppo_rollout():
    batch = batch_of()
    score, finished = torch.randn(8, dtype=torch.float64), torch.tensor([True] * 5 + [False] * 3)
    kl = [sum(row) for row in tokens(batch.old_logp - batch.ref_logp, batch)]
    want = {
        "objective/kl": fmean(kl),
        "objective/entropy": -fmean(sum(row) for row in tokens(batch.old_logp, batch)),
        "objective/non_score_reward": -0.2 * fmean(kl),
        "objective/rlhf_reward": float(score.mean()) - 0.2 * fmean(kl),
        "objective/scores": float(score.mean()),
        "val/num_eos_tokens": 5,
    }
    assert got(metrics.ppo_rollout(score, batch, finished, kl_coef=0.2)) == near(want)


def test_ppo_update():
    batch = batch_of()
    stats, values = stats_of(batch), -torch.rand(batch.target.numel(), dtype=torch.float64)
    columns = (stats.logp, batch.old_logp, batch.advantage, values, batch.old_value, batch.return_)
    rows = list(zip(*(flat(x, batch) for x in columns), strict=True))
    ratio = [math.exp(new - old) for new, old, *_ in rows]
    plain = [-r * a for r, (_, _, a, *_) in zip(ratio, rows, strict=True)]
    clipped = [-min(max(r, 0.9), 1.1) * a for r, (_, _, a, *_) in zip(ratio, rows, strict=True)]
    error = [(v - R) ** 2 for *_, v, _, R in rows]
    bounded = [(o + min(max(v - o, -0.3), 0.3) - R) ** 2 for *_, v, o, R in rows]
    rest = [R - v for *_, v, _, R in rows]
    want = {
        "policy/approxkl_avg": fmean((new - old) ** 2 / 2 for new, old, *_ in rows),
        "policy/clipfrac_avg": fmean(b > a for a, b in zip(plain, clipped, strict=True)),
        "policy/entropy_avg": fmean(flat(stats.entropy, batch)),
        "loss/policy_avg": fmean(map(max, plain, clipped)),
        "val/ratio": fmean(ratio),
        "val/ratio_var": variance(ratio),
        "val/clipfrac_avg": fmean(b > a for a, b in zip(error, bounded, strict=True)),
        "loss/value_avg": fmean(max(pair) / 2 for pair in zip(error, bounded, strict=True)),
        "val/explained_variance": 1 - variance(rest) / variance([R for *_, R in rows]),
    }
    assert got(metrics.ppo_update(stats, batch, values, cliprange=0.1, cliprange_value=0.3)) == near(want)
    assert 0 < want["policy/clipfrac_avg"] < 1 and 0 < want["val/clipfrac_avg"] < 1


def test_the_losses_of_ppo_are_those_that_are_minimised():
    batch = batch_of()
    stats, values = stats_of(batch), -torch.rand(batch.target.numel(), dtype=torch.float64)
    seen = got(metrics.ppo_update(stats, batch, values))
    kept = batch.target != -100
    assert seen["loss/policy_avg"] == pytest.approx(float(losses.ppo(stats, batch)[kept].mean()))
    assert seen["loss/value_avg"] == pytest.approx(float(losses.value(values, batch)[kept].mean()))
    want = float(losses.explained_variance(values, batch))
    assert seen["val/explained_variance"] == pytest.approx(want)
