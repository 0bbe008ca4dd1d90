"""Kappa, its standard error, and the biases, against closed forms, published values, exact enumeration, and draws."""

from __future__ import annotations

import math
import random

import pytest
import torch

pytest.importorskip("transformers")

from fastpost.judging.agreement import accuracy, kappa, share
from fastpost.judging.bias import itself, length, place, slope
from fastpost.judging.verdicts import Preference


def raters(table: list[list[int]]) -> tuple[list[int], list[int]]:
    cells = [(i, j) for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)]
    return [i for i, _ in cells], [j for _, j in cells]


def test_kappa_is_that_of_the_papers():
    # Cohen's two readers of 50 applications: p_o 0.7, p_e 0.5.
    found = kappa(*raters([[20, 5], [10, 15]]))
    assert found.value == pytest.approx(0.4) and found.n == 50
    # Fleiss, Cohen and Everitt 1969, their example of three kinds.
    assert round(kappa(*raters([[106, 10, 4], [22, 28, 10], [2, 12, 6]])).value, 3) == 0.429


def delta_method(table: list[list[int]]) -> tuple[float, float]:
    """The same by autograd in float64: the variance of a smooth function of multinomial shares."""
    counts = torch.tensor(table, dtype=torch.float64)
    n = counts.sum()
    p = (counts / n).requires_grad_()
    chance = (p.sum(1) * p.sum(0)).sum()
    value = (p.trace() - chance) / (1 - chance)
    (g,) = torch.autograd.grad(value, p)
    variance = (p * g**2).sum() - (p * g).sum() ** 2
    return value.item(), (variance / n).sqrt().item()


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_the_delta_method(seed: int):
    table = torch.randint(0, 30, (3, 3), generator=torch.Generator().manual_seed(seed)).tolist()
    found = kappa(*raters(table))
    assert (found.value, found.se) == pytest.approx(delta_method(table), rel=1e-12)


def test_kappa_where_chance_says_all_is_none():
    assert kappa(["a"] * 5, ["a"] * 5) is None and kappa([], []) is None and accuracy([], []) is None
    assert kappa(["a", "b"], ["a", "b"]).value == 1.0 and kappa(["a", "b"], ["b", "a"]).value == -1.0
    assert kappa(["a", "a"], ["a", "b"]).value == 0.0
    assert share([1.0, 0.0, 0.0, 1.0]).se == pytest.approx(math.sqrt(0.25 / 4))


def pair(first: float | None, second: float | None) -> Preference:
    p = None if first is None or second is None else (first + second) / 2
    return Preference(p, orders=(first, second))


def test_place_is_read_from_the_orders():
    found = place([pair(1, 1), pair(1, 0), pair(0, 1), pair(0.5, 1), pair(0.5, 0.5), pair(1, None)])
    assert (found.flips.value, found.flips.n) == (2 / 5, 5)
    # in first place won: (1 no), then (1 yes, 0 yes), (0 no, 1 no), (1 in second place: no): of those that are no tie
    assert (found.first_place_wins.value, found.first_place_wins.n) == (3 / 7, 7)
    assert place([pair(1, None)]).flips is None


def test_the_slope_of_two_lengths_is_the_log_odds_ratio():
    """Saturated: the likeliest fit goes through both shares, and the variance is Woolf's 1/a + 1/b + 1/c + 1/d."""
    x, y = [-1.0] * 30 + [2.0] * 50, [1.0] * 12 + [0.0] * 18 + [1.0] * 35 + [0.0] * 15
    found = slope(x, y)
    wanted = (math.log(35 / 15) - math.log(12 / 18)) / 3
    assert found.value == pytest.approx(wanted, rel=1e-9)
    assert found.se == pytest.approx(math.sqrt(1 / 35 + 1 / 15 + 1 / 12 + 1 / 18) / 3, rel=1e-6)


def test_the_slope_is_a_maximum_and_finds_what_drew_it():
    draw = random.Random(0)
    x = [draw.gauss(0, 1) for _ in range(1000)]
    y = [float(draw.random() < 1 / (1 + math.exp(-(0.3 + 0.8 * each)))) for each in x]
    found = slope(x, y)
    assert abs(found.value - 0.8) < 4 * found.se and 0.05 < found.se < 0.12
    a = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([a], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = a[0] + a[1] * torch.tensor(x, dtype=torch.float64)
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(y, dtype=torch.float64))
        value.backward()
        return value

    optimizer.step(loss)
    assert found.value == pytest.approx(a[1].item(), abs=1e-7)


def test_no_slope_where_none_is_finite():
    assert slope([-1.0, -0.5, 0.5, 1.0], [0.0, 0.0, 1.0, 1.0]) is None
    assert slope([1.0] * 4, [0.0, 1.0, 1.0, 0.0]) is None and slope([], []) is None


def test_length_counts_the_pairs_that_differ():
    found = [Preference(p) for p in (1.0, 0.0, 0.5, 1.0, None)]
    lengths, labels = [(3, 2), (3, 2), (2, 4), (5, 5), (9, 1)], ["first", "first", None, "tie", "first"]
    got = length(found, labels, lengths)
    assert (got.longer_wins.value, got.longer_wins.n) == (0.5, 3)
    assert (got.longer_wins_by_label.value, got.longer_wins_by_label.n) == (1.0, 2)


def test_its_own_answers_against_the_labels():
    found = [Preference(p) for p in (1.0, 1.0, 0.0, 0.0, 1.0)]
    labels = ["first", "second", "first", "second", None]
    own = [(True, False), (True, False), (False, True), (False, False), (True, True)]
    got = itself(found, labels, own)
    assert (got.wins.value, got.wins_by_label.value, got.wins.n) == (1.0, 1 / 3, 3)
    assert got.accuracy.value == 1 / 3 and (got.accuracy_elsewhere.value, got.accuracy_elsewhere.n) == (1.0, 1)
    assert itself(found, labels, [(False, False)] * 5) is None
