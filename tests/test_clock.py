"""A step's seconds: its parts, which add up to it, whatever else the process did."""

from __future__ import annotations

import pytest

from fastpost.trainers import clock
from fastpost.trainers.clock import Clock


class Time:
    """A clock that goes when it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)

    def goes(self, seconds: float) -> None:
        self.now += seconds


def test_the_parts_of_a_step_add_up_to_it(monkeypatch: pytest.MonkeyPatch):
    time = Time(monkeypatch)
    ours = Clock()
    time.goes(100.0)  # before the first round
    ours.start()
    time.goes(3.5)
    ours.spend({"step_time/rollout": 3.0, "step_time/reward": 0.5})
    score = ours.part("reference")(time.goes)
    score(2.0)
    time.goes(1.0)
    score(0.25)
    said = {"step_time/rollout": 3.0, "step_time/reward": 0.5, "step_time/reference": 2.25, "step_time/update": 1.0}
    assert ours.step() == said


def test_a_second_step_on_the_same_rollouts_has_none_of_its_own_and_an_evaluation_counts_for_no_step(
    monkeypatch: pytest.MonkeyPatch,
):
    time = Time(monkeypatch)
    ours = Clock()
    time.goes(3.0)
    ours.spend({"step_time/rollout": 3.0})
    ours.step()
    time.goes(1.5)
    assert ours.step() == {"step_time/rollout": 0.0, "step_time/update": 1.5}
    with ours.part("rollout"):
        time.goes(50.0)  # of an evaluation
    ours.start()
    time.goes(0.5)
    assert ours.step() == {"step_time/rollout": 0.0, "step_time/update": 0.5}
