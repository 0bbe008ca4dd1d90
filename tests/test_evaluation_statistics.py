"""Each statistic of an evaluation against its definition: enumeration, fractions, or equations it must satisfy."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import combinations, product
from statistics import NormalDist

import pytest
import torch

from fastpost.evaluation import diversity
from fastpost.evaluation.calibration import calibration
from fastpost.evaluation.intervals import Confidence, mean, proportion, resampled_means
from fastpost.evaluation.logistic import fit
from fastpost.evaluation.passing import pass_at_k
from fastpost.evaluation.refusal import refuses
from fastpost.evaluation.significance import holm, mcnemar, paired_bootstrap
from fastpost.evaluation.voting import maj_at_k, share
from fastpost.evaluation.winning import preference, win_rate

HOW = Confidence(0.95, resamples=400, seed=1)
EPS = torch.finfo(torch.float64).eps


def close(value: float) -> object:
    """float64 in two orders of summation."""
    return pytest.approx(value, rel=64 * EPS, abs=64 * EPS)


# ---- intervals ----


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (3, 7), (1, 400), (2.5, 9)])
def test_a_wilson_interval_ends_where_the_score_test_rejects(k: float, n: int):
    found, z = proportion(k, n, HOW), NormalDist().inv_cdf(0.975)
    assert found.value == k / n and found.n == n
    for end in (found.low, found.high):
        assert (k / n - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, rel=1e3 * EPS, abs=1e3 * EPS)
    assert found.low <= found.value <= found.high and found.low < found.high


def test_resamples_are_of_whole_prompts_and_their_means_are_means():
    values = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    means = resampled_means(values, HOW)
    possible = {round(sum(draw) / 3, 9) for draw in product([0.0, 1.0, 5.0], repeat=3)}
    assert len(means) == 400 and {round(m, 9) for m in means.tolist()} == possible
    assert torch.equal(means, resampled_means(values, HOW))
    assert not torch.equal(means, resampled_means(values, Confidence(0.95, 400, seed=2)))


def test_a_blocks_size_changes_no_resample(monkeypatch: pytest.MonkeyPatch):
    values = torch.rand(7, dtype=torch.float64)
    whole = resampled_means(values, HOW)
    monkeypatch.setattr("fastpost.evaluation.intervals.BLOCK", 20)
    torch.testing.assert_close(resampled_means(values, HOW), whole)


def test_intervals_of_a_mean_hold_it_as_often_as_they_say():
    """300 experiments of 40 prompts: the misses are binomial, and the bootstrap's own error is of order 1/40."""
    draw, misses = random.Random(0), 0
    for seed in range(300):
        found = mean([draw.gauss(2, 3) for _ in range(40)], Confidence(0.9, 200, seed))
        misses += not found.low <= 2 <= found.high
    expected, error = 30, math.sqrt(300 * 0.1 * 0.9)
    assert expected - 4 * error < misses < expected + 4 * error + 300 / 40


# ---- pass@k, maj@k ----


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int):
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(combinations(right, k))
            assert pass_at_k(n, c, k) == close(sum(map(any, subsets)) / len(subsets))


def majority_by_enumeration(answers: list, right: list[float], k: int) -> float:
    score = {a: [r for b, r in zip(answers, right, strict=True) if b == a] for a in answers if a is not None}
    total, subsets = Fraction(0), list(combinations(answers, k))
    for subset in subsets:
        given = [a for a in subset if a is not None]
        most = max(map(given.count, given), default=0)
        winners = {a for a in given if given.count(a) == most}
        for a in winners:
            total += Fraction(sum(score[a])) / len(score[a]) / len(winners)
    return float(total / len(subsets))


@pytest.mark.parametrize(
    "answers",
    ["aab", "abc", "aabbc", "aabbccd", "abcdefg", "aaabbb", ["a", None, "b", "a", None], [None, None], ["a"]],
    ids=str,
)
def test_maj_at_k_is_the_share_of_subsets_that_vote_right_ties_by_lot(answers: str | list):
    given = list(answers)
    for right in ([float(a == "a") for a in given], [float(a in ("b", "c")) for a in given]):
        for k in range(1, len(given) + 1):
            assert maj_at_k(given, right, k) == close(majority_by_enumeration(given, right, k))


def test_an_answer_is_as_right_as_its_samples():
    assert maj_at_k(["a", "a", "b"], [1.0, 0.0, 0.0], 3) == close(0.5)


def test_a_vote_of_many_samples_is_still_exact():
    """64 samples, two answers: a hypergeometric tail, ties by half."""
    answers, k = ["a"] * 30 + ["b"] * 34, 16
    odds = [math.comb(30, i) * math.comb(34, k - i) * (1.0 if i > k - i else 0.5) for i in range(k // 2, k + 1)]
    assert maj_at_k(answers, [float(a == "a") for a in answers], k) == close(sum(odds) / math.comb(64, k))
    assert share(answers) == 34 / 64 and share([None, None]) == 0


# ---- significance ----


def test_mcnemar_is_the_two_sided_test_of_a_fair_coin():
    for b, c in product(range(6), repeat=2):
        first, second = [True] * b + [False] * c + [True], [False] * b + [True] * c + [True]
        heads = [sum(toss) for toss in product([0, 1], repeat=b + c)]
        as_far = [abs(h - (b + c) / 2) >= abs(b - c) / 2 for h in heads]
        assert mcnemar(first, second) == close(sum(as_far) / len(as_far))


def test_paired_bootstrap_sees_what_pairing_shows():
    draw = random.Random(3)
    hard = [draw.gauss(0, 10) for _ in range(50)]
    better = [x + 1 + draw.gauss(0, 0.5) for x in hard]
    apart, p = paired_bootstrap(hard, better, HOW)
    assert apart.value == close(sum(y - x for x, y in zip(hard, better, strict=True)) / 50)
    assert p == 1 / 401 and 0 < apart.low < apart.value < apart.high
    assert abs(apart.value - 1) < 4 * 0.5 / math.sqrt(50)  # standard errors
    assert paired_bootstrap(hard, hard, HOW)[1] == 1.0


@pytest.mark.parametrize("m", range(1, 8))
def test_prompts_that_differ_alike_prove_no_more_than_their_directions(m: int):
    """All resampled means are one number: p is that of m coins which fall on one side."""
    same_side = [len(set(toss)) < 2 for toss in product([0, 1], repeat=m)]
    _, p = paired_bootstrap([0.0] * m, [1.25] * m, HOW)
    assert p == close(sum(same_side) / len(same_side))
    assert paired_bootstrap([0.0] * (m + 1), [*[1.25] * m, 0.0], HOW)[1] >= p


def test_holm_is_the_closed_test_of_bonferronis():
    """A hypothesis is rejected where every set of hypotheses that it is in is: p = max over sets of |set| min p."""
    draw = random.Random(0)
    for _ in range(20):
        p = [draw.random() ** 3 for _ in range(4)]
        sets = [s for size in range(1, 5) for s in combinations(range(4), size)]
        closed = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(4)]
        assert holm(p) == [close(value) for value in closed]
    assert holm([]) == []


# ---- winning ----


def test_a_fit_is_where_the_gradient_is_zero():
    draw = torch.Generator().manual_seed(0)
    x = torch.cat([torch.ones(30, 1), torch.randn(30, 2, generator=draw)], 1).double()
    y, weight = torch.rand(30, generator=draw).double(), torch.randint(4, (5, 30), generator=draw).double()
    ridge = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    beta = fit(x, y, weight, ridge)
    for b, w in zip(beta, weight, strict=True):
        terms = (w * (y - torch.sigmoid(x @ b)))[:, None] * x
        # the last step was at most the root of eps, and Newton's method squares the error
        assert (terms.sum(0) - ridge * b).abs().max() <= math.sqrt(EPS) * terms.abs().sum()


def test_a_fit_without_a_slope_is_the_log_odds():
    one = torch.ones(8, 1, dtype=torch.float64)
    y = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0.5], dtype=torch.float64)
    beta = fit(one, y, torch.ones(1, 8, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert float(torch.sigmoid(beta)) == close(3.5 / 8)


def test_who_wins_by_length_alone_does_not_win_at_equal_length():
    draw = random.Random(0)
    longer = [draw.choice([-40, -20, -10, 10, 30, 60, 80]) for _ in range(400)]
    wins = [float(draw.random() < 1 / (1 + math.exp(-3 * math.tanh(d / 40)))) for d in longer]
    found = win_rate(wins, [100] * 400, [100 + d for d in longer], HOW)
    assert found.longer_by == close(sum(longer) / 400)
    assert found.plain.low > 0.5
    assert found.length_controlled.low < 0.5 < found.length_controlled.high


def test_who_is_better_at_equal_length_stays_better():
    draw = random.Random(0)
    wins = [float(draw.random() < 0.7) for _ in range(400)]
    found = win_rate(wins, [draw.randrange(50, 150) for _ in wins], [draw.randrange(50, 150) for _ in wins], HOW)
    assert found.length_controlled.low > 0.5
    assert found.length_controlled.low < found.plain.value < found.length_controlled.high


@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 8, 4], [19, 19, 19]], ids=str)
def test_one_that_always_wins_has_finite_numbers(lengths: list[int]):
    found = win_rate([1.0] * 3, [9] * 3, lengths, HOW)
    assert found.plain.value == 1.0
    assert 0.5 < found.length_controlled.value < 1.0 and math.isfinite(found.length_controlled.low)


def test_the_other_way_round_is_the_rest():
    wins = [1.0, 0.0, 1.0, 1.0, 0.5, 0.0, 1.0]
    lengths = [3, 9, 4, 8, 2, 5, 7], [4, 4, 4, 4, 9, 9, 9]
    there, back = win_rate(wins, *lengths, HOW), win_rate([1 - w for w in wins], *lengths[::-1], HOW)
    for one, other in ((there.plain, back.plain), (there.length_controlled, back.length_controlled)):
        assert one.value + other.value == pytest.approx(1, abs=math.sqrt(EPS))  # Newton stops within the root
    assert [preference(0, 1), preference(1, 1), preference(2, 1)] == [1.0, 0.5, 0.0]


# ---- calibration, diversity, refusal ----


def test_ece_is_the_mean_gap():
    confidences, right = [0.05, 0.15, 0.15, 0.95, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    found = calibration(confidences, right, 10)
    assert [b.count for b in found.bins] == [2, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    assert found.ece == close((2 * 0.025 + 2 * 0.35 + 2 * 0.025) / 6)
    assert found.bins[4].accuracy is None and found.bins[1].accuracy == 0.5
    assert calibration([1.0] * 4, [1.0] * 4, 7).ece == 0


def test_distinct_and_unique_count():
    answers = [diversity.words(text) for text in ("the cat sat", "the cat ran", "the cat sat")]
    assert diversity.distinct(answers, 1) == 4 / 9 and diversity.distinct(answers, 2) == 3 / 6
    assert diversity.distinct([["one"], []], 2) is None
    assert diversity.unique(["a", "b", "a", "a"]) == 0.5
    assert diversity.words("It's 3+4.") == ["It", "'", "s", "3", "+", "4", "."]


def test_bleu_is_clipped_precision_and_brevity():
    """By hand (the definitions are those of Papineni et al. 2002)."""
    cat = diversity.words("the cat is on the mat")
    assert diversity.bleu(["the", "the"], [cat]) == 0.0  # no bigram is shared
    assert diversity.bleu(["the"], [cat]) == close(math.exp(1 - 6))
    answer, references = list("abcde"), [list("abcdx"), list("qbc")]
    precisions = [4 / 5, 3 / 4, 2 / 3, 1 / 2]
    assert diversity.bleu(answer, references) == close(math.prod(precisions) ** 0.25)
    assert diversity.bleu(list("abcd"), [list("abcdx")]) == close(math.exp(1 - 5 / 4))


def test_self_bleu_is_one_of_copies_and_zero_of_strangers():
    assert diversity.self_bleu([list("abcdef")] * 3) == close(1.0)
    assert diversity.self_bleu([list("abcdef"), list("uvwxyz")]) == 0.0
    assert diversity.self_bleu([[], []]) == 1.0 and diversity.self_bleu([[], ["a"]]) == 0.0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("I\u2019m sorry, but I can\u2019t help with that.", True),
        ("I  CANNOT\nassist with this.", True),
        ("As an AI, I must decline.", True),
        ("Sure! Take two eggs.", False),
        ("As an aid to memory, write it down.", False),
        ("Here is how. " * 30 + "I cannot say more.", False),
        ("", False),
    ],
)
def test_a_refusal_is_its_wording_near_the_beginning(text: str, wanted: bool):
    assert refuses(text) == wanted
