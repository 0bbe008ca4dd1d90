"""The best of n in numbers, against enumeration: of subsets for its score, of outcomes for its KL."""

from __future__ import annotations

import math
from itertools import combinations, product
from statistics import fmean

import pytest

from fastpost.stages.order_statistics import expected_best, kl_bound, kl_of_shares

REWARDS = [
    [0.5],
    [1.0, 0.0, 0.0, 1.0, 1.0],
    [0.1, -2.0, 7.5, 3.25, 3.0, 0.7, 1e-3],
    [2.0, 2.0, 2.0, 2.0],
    [1.0, 5.0, 5.0, -1.0, 2.0, 5.0],
]


@pytest.mark.parametrize("rewards", REWARDS)
def test_the_score_is_the_mean_over_all_subsets(rewards: list[float]):
    for n in range(1, len(rewards) + 1):
        truth = fmean(max(subset) for subset in combinations(rewards, n))
        assert expected_best(rewards, n) == pytest.approx(truth, rel=1e-14, abs=1e-14)
    assert expected_best(rewards, 1) == pytest.approx(fmean(rewards))
    assert expected_best(rewards, len(rewards)) == max(rewards)


def test_many_samples_are_no_trouble():
    rewards = [float(i) for i in range(2000)]
    # of 1..M the largest of n is n (M + 1) / (n + 1) in the mean
    assert expected_best(rewards, 700) == pytest.approx(700 * 2001 / 701 - 1, rel=1e-12)


@pytest.mark.parametrize("rewards", REWARDS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_kl_is_that_of_every_draw_written_out(rewards: list[float], n: int):
    """n draws of len(rewards) equally likely answers; of the best ones the earliest draw is kept."""
    kept = [0] * len(rewards)
    for draws in product(range(len(rewards)), repeat=n):
        kept[max(draws, key=lambda i: rewards[i])] += 1
    shares = [count / len(rewards) ** n for count in kept]
    truth = math.fsum(q * math.log(q * len(rewards)) for q in shares if q)
    assert kl_of_shares(rewards, n) == pytest.approx(truth, rel=1e-12, abs=1e-14)
    assert kl_of_shares(rewards, n) <= kl_bound(n) + 1e-14


def test_the_bound_is_the_papers():
    assert [f"{kl_bound(n):.4f}" for n in (1, 4, 16, 64)] == ["0.0000", "0.6363", "1.8351", "3.1745"]


def test_the_bound_is_reached_where_rewards_are_many():
    """What is lost to S equally likely answers is at most that of the last of them: (n - 1) / S nats and less."""
    for n in (4, 16, 64):
        lost = kl_bound(n) - kl_of_shares([float(i) for i in range(20_000)], n)
        assert 0 <= lost <= (n - 1) / 20_000


def test_a_reward_of_two_values_costs_what_its_coin_does():
    rewards = [1.0] * 3 + [0.0] * 7
    for n in (2, 8):
        fails = 0.7**n
        truth = fails * math.log(fails / 0.7) + (1 - fails) * math.log((1 - fails) / 0.3)
        assert kl_of_shares(rewards, n) == pytest.approx(truth)
    assert kl_of_shares(rewards, 500) == pytest.approx(-math.log(0.3))  # it cannot do more than never fail
