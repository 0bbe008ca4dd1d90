"""Warnings: each known failure is told by its own curves, with the step and the numbers, and a healthy run by none."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fastpost.watching import curves, levels, trends
from fastpost.watching.advice import ADVICE
from fastpost.watching.warnings import CHECKS, warnings

LINES, EVERY = 60, 10
Curves = Mapping[str, Callable[[float], float | None]]  # name -> its value at a share of the run, 0 to 1


def noise(at: float, size: float, name: str = "") -> float:
    """The same each time, unrelated between names."""
    return random.Random(f"{name} {at}").gauss(0, size)


def rises(first: float, last: float, size: float = 0.02, name: str = "") -> Callable[[float], float]:
    """From first to last, quickly and then slowly, with noise of a share of the way."""
    scale = size * max(abs(last - first), 0.1 * abs(first))
    return lambda at: first + (last - first) * (1 - math.exp(-4 * at)) + noise(at, scale, name)


HEALTHY: Mapping[str, Curves] = {
    "grpo": {
        "loss": rises(0.0, 0.01),
        "reward": rises(0.2, 0.8, 0.05, "reward"),
        "entropy": rises(0.9, 0.3),
        "kl": rises(0.0, 0.03),
        "kl_budget/sequence": rises(0.0, 8.0),
        "grad_norm": rises(0.4, 0.9, 0.2),
        "frac_reward_zero_std": rises(0.3, 0.4, 0.3),
        "completions/mean_length": rises(300.0, 700.0, 0.05, "length"),  # reasoning may grow, and be worth it
        "completions/mean_terminated_length": lambda at: None,
        "completions/clipped_ratio": rises(0.3, 0.05),
        "clip_ratio/region_mean": rises(0.0, 0.02),
        "sampling/importance_sampling_ratio/mean": rises(1.0, 0.98),
    },
    "ppo": {
        "objective/kl": rises(0.0, 9.0),
        "objective/scores": rises(-1.0, 2.0),
        "policy/entropy_avg": rises(1.5, 0.8),
        "policy/clipfrac_avg": rises(0.05, 0.12),
        "val/explained_variance": rises(-0.8, 0.7),
        "val/num_eos_tokens": rises(20.0, 30.0),
        "loss/value_avg": rises(2.0, 0.2),
    },
    "dpo": {
        "loss": rises(0.693, 0.4),
        "logps/chosen": lambda at: -200 + noise(at, 12, "c") - 4 * at,  # a little is usual
        "logps/rejected": lambda at: -220 + noise(at, 12, "r") - 40 * at,
        "rewards/accuracies": rises(0.5, 0.8),
        "rewards/margins": rises(0.0, 1.2),
        "entropy": rises(1.2, 0.01),  # an SFT-like sharpening of given answers is no collapse
        "eval_loss": rises(0.693, 0.5),
    },
    "online-dpo": {
        "loss": rises(0.693, 0.6),
        "reward": rises(0.5, 0.5),
        "objective/kl": rises(0.0, 9.0),
        "judge/flips": rises(0.3, 0.2, 0.1),
        "judge/ties": rises(0.1, 0.3, 0.1),
    },
    "kto": {"loss": rises(0.5, 0.4), "kl": rises(0.0, 4.0), "rewards/margins": rises(0.0, 1.0)},
    "reward": {
        "loss": rises(0.7, 0.5),
        "accuracy": rises(0.47, 0.75),
        "margin": rises(0.0, 1.0),
        "eval_accuracy": rises(0.6, 0.7),
    },
    "sft": {"loss": rises(4.0, 0.001), "entropy": rises(4.0, 0.001), "eval_loss": rises(4.0, 1.5, 0.001)},
}


def lines(run: Curves, number: int = LINES) -> list[dict[str, Any]]:
    return [
        {"step": EVERY * (i + 1)} | {name: value((i + 1) / number) for name, value in run.items()}
        for i in range(number)
    ]


def from_half(before: float, after: float | None) -> Callable[[float], float | None]:
    return lambda at: before if at <= 0.5 else after


def with_length(at: float) -> float:
    return 100 + 300 * at + noise(at, 20, "length")


# name of the failure -> the verb, and what of its healthy curves is otherwise.
FAILURES: Mapping[str, list[tuple[str, Curves]]] = {
    "not a number": [("grpo", {"reward": from_half(0.5, None)}), ("sft", {"loss": from_half(2.0, math.nan)})],
    "KL beyond the budget": [
        ("grpo", {"kl_budget/sequence": rises(0.0, 90.0)}),
        ("ppo", {"objective/kl": rises(0.0, 70.0)}),
    ],
    "entropy collapse": [
        ("grpo", {"entropy": rises(0.9, 0.0)}),
        ("ppo", {"policy/entropy_avg": from_half(0.15, 0.012)}),
    ],
    "groups without variance": [("grpo", {"frac_reward_zero_std": from_half(0.3, 0.96)})],
    "gradient explodes": [("grpo", {"grad_norm": from_half(0.8, 30.0)})],
    "much is clipped": [
        ("grpo", {"clip_ratio/region_mean": from_half(0.02, 0.4)}),
        ("ppo", {"policy/clipfrac_avg": from_half(0.1, 0.5)}),
    ],
    "critic explains nothing": [("ppo", {"val/explained_variance": rises(-2.0, -0.1)})],
    "completions do not end": [
        ("grpo", {"completions/clipped_ratio": from_half(0.1, 1.0)}),
        ("ppo", {"val/num_eos_tokens": from_half(9.0, 0.0)}),
    ],
    "judge goes by place": [("online-dpo", {"judge/flips": from_half(0.3, 0.7)})],
    "no better than a coin": [
        ("reward", {"accuracy": lambda at: 0.45 + noise(at, 0.02)}),
        ("reward", {"eval_accuracy": lambda at: 0.43}),
        ("dpo", {"rewards/accuracies": rises(0.5, 0.3)}),
    ],
    "sampler mismatch": [("grpo", {"sampling/importance_sampling_ratio/mean": from_half(1.0, 0.2)})],
    "both log-probabilities fall": [
        ("dpo", {"logps/chosen": lambda at: -200 + noise(at, 12, "c") - 60 * at}),
    ],
    "reward is length": [
        ("grpo", {"completions/mean_length": with_length, "reward": lambda at: with_length(at) / 400}),
        ("grpo", {"reward_length_correlation": lambda at: 0.8}),
    ],
    "overfits": [("sft", {"eval_loss": lambda at: 2 + 4 * (at - 0.4) ** 2})],
}
CASES = [(name, verb, changes) for name, cases in FAILURES.items() for verb, changes in cases]


@pytest.mark.parametrize("verb", HEALTHY)
@pytest.mark.parametrize("number", [1, 3, 8, LINES])
def test_of_a_healthy_run_there_is_nothing_to_say(verb: str, number: int):
    assert warnings(lines(HEALTHY[verb])[:number], verb) == []


@pytest.mark.parametrize(("name", "verb", "changes"), CASES)
def test_a_failure_is_told_and_nothing_else(name: str, verb: str, changes: Curves):
    found = warnings(lines({**HEALTHY[verb], **changes}), verb)
    assert [warning.name for warning in found] == [name]
    (warning,) = found
    assert warning.step % EVERY == 0 and 0 < warning.step <= EVERY * LINES
    assert warning.seen.endswith(".") and warning.helps == ADVICE[name]
    assert str(warning) == f"{name}, from step {warning.step}: {warning.seen} {warning.helps}"


def test_every_check_has_its_advice_its_test_and_its_line_in_the_docs():
    assert CHECKS.keys() == ADVICE.keys() == FAILURES.keys()
    docs = (Path(__file__).parent.parent / "docs" / "watching.md").read_text()
    assert re.findall(r"^\| ([a-zA-Z -]+) \| ", docs, re.MULTILINE)[1:] == list(CHECKS)


def test_a_warning_names_the_step_at_which_the_level_was_crossed():
    """From line 31 on all groups are without variance: five lines later their mean is."""
    (warning,) = warnings(lines({**HEALTHY["grpo"], "frac_reward_zero_std": from_half(0.0, 1.0)}), "grpo")
    assert warning.step == EVERY * (LINES // 2 + levels.SPAN)
    assert "100% of the groups" in warning.seen
    (warning,) = warnings(lines({**HEALTHY["grpo"], "reward": from_half(0.5, None)}), "grpo")
    assert (warning.step, warning.seen) == (EVERY * (LINES // 2 + 1), "reward came out as no number.")


def test_one_line_out_of_many_warns_of_nothing():
    """Each metric that a level is asked of, at its worst for a line."""
    worst = {"kl_budget/sequence": 200.0, "entropy": 0.0, "frac_reward_zero_std": 1.0, "grad_norm": 500.0}
    worst |= {"completions/clipped_ratio": 1.0, "clip_ratio/region_mean": 1.0}
    run = lines({**HEALTHY["grpo"], "kl_budget/sequence": lambda at: 5.0})
    assert warnings([*run[:30], run[30] | worst, *run[31:]], "grpo") == []


def test_the_target_of_the_controller_is_the_budget():
    run = lines({**HEALTHY["ppo"], "objective/kl": lambda at: 13.0})
    assert warnings(run, "ppo") == warnings(run, "ppo", target_kl=7.0) == []
    (warning,) = warnings(run, "ppo", target_kl=6.0)
    assert warning.name == "KL beyond the budget" and "13 nats a completion, and the budget is 12" in warning.seen


def test_without_the_kl_of_a_completion_that_of_a_token_counts():
    run = lines({"kl": lambda at: 0.6})
    assert [warning.name for warning in warnings(run, "grpo")] == ["KL beyond the budget"]
    assert warnings(run, "kto") == []
    assert warnings([line | {"kl_budget/sequence": 3.0} for line in run], "grpo") == []


def test_length_that_is_worth_it_is_not_blamed():
    """Reward and length rise along one curve, but their noise is their own: correlation of levels is near 1."""
    run = lines(HEALTHY["grpo"])
    reward, length = (curves.curve(run, name) for name in ("reward", "completions/mean_length"))
    _, x, y = zip(*curves.joined(reward, length), strict=True)
    assert curves.correlation(x, y) > trends.LEVELS
    assert warnings(run, "grpo") == []


def test_trend_counts_in_standard_errors():
    flat = [(i, noise(i, 1.0)) for i in range(200)]
    steep = [(i, 0.1 * i + noise(i, 1.0)) for i in range(200)]
    assert abs(curves.trend(flat).errors) < 3 < curves.trend(steep).errors
    assert curves.trend(flat[:11]) is None
    assert curves.trend([(i, 2.0) for i in range(20)]).errors == 0
    assert curves.trend([(i, float(i >= 10)) for i in range(20)]).errors == math.inf


def test_smoothing_keeps_a_constant_and_the_steps():
    points = [(float(i), 3.0) for i in range(100)]
    assert [step for step, _ in curves.smoothed(points)] == [step for step, _ in points]
    assert all(math.isclose(value, 3.0) for _, value in curves.smoothed(points))
    assert curves.smoothed(points[:10]) == points[:10]  # too short to be smoothed


def test_null_bools_and_text_are_no_points():
    run = [
        {"step": 1, "x": None},
        {"step": 2, "x": True},
        {"step": 3, "x": "1"},
        {"step": 4, "x": math.inf},
        {"step": 5, "x": 1},
    ]
    assert curves.curve(run, "x") == [(5, 1.0)]
    assert curves.curve(run, "y", "x") == [(5, 1.0)]
    assert curves.curve([], "x") == []
