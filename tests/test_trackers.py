"""Trackers: accelerate's, told every number of a line; refused by name where they are not installed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

from accelerate import PartialState, tracking
from accelerate.logging import get_logger

from fastpost.watching.trackers import Trackers, open_trackers, tracker_classes

SETTINGS = {"model": "m", "learning_rate": 1e-6, "bf16": None, "reward": ("a", "b"), "packed": True}
LINE = {"step": 10, "loss": 0.5, "reward": None, "kl": math.nan, "num_tokens": 1000}


class Noted(tracking.GeneralTracker):
    """A tracker that remembers."""

    name = "noted"
    requires_logging_directory = False
    made: list[Noted] = []  # noqa: RUF012

    def __init__(self, run_name: str, **given: Any):
        super().__init__()
        self.run_name, self.given, self.calls = run_name, given, []
        self.made.append(self)

    @property
    def tracker(self) -> Any:
        return self

    def start(self) -> None:
        self.calls.append(("start",))

    def store_init_configuration(self, values: dict) -> None:
        self.calls.append(("settings", values))

    def log(self, values: dict, step: int | None = None, **given: Any) -> None:
        if step == 13:
            raise ConnectionError("no route")
        self.calls.append(("log", values, step))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Noted]]:
    monkeypatch.setattr(Noted, "made", [])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "noted", Noted)
    yield Noted.made


def silent(text: str) -> None:
    raise AssertionError(text)


def test_a_tracker_is_told_settings_and_numbers(noted: list[Noted], tmp_path: Path):
    trackers = open_trackers(["noted", "noted"], tmp_path, SETTINGS, silent)
    trackers.log(LINE, 10)
    trackers.finish()
    (one,) = noted
    assert one.run_name == "fastpost" and one.given == {}
    plain = {"model": "m", "learning_rate": 1e-6, "bf16": "none", "reward": "a, b", "packed": True}
    assert one.calls == [("start",), ("settings", plain), ("log", {"loss": 0.5, "num_tokens": 1000}, 10), ("finish",)]


def test_a_tracker_may_speak_through_accelerates_logger(noted: list[Noted], tmp_path: Path, monkeypatch: Any):
    """As that of wandb does when it starts; the logger raises where there is no state."""
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(Noted, "start", lambda self: get_logger("noted").debug("started"))
    open_trackers(["noted"], tmp_path, SETTINGS, silent)


def test_one_that_fails_is_left_out_and_the_others_go_on(noted: list[Noted]):
    heard: list[str] = []
    good = Noted("good")
    good.log = lambda values, step: good.calls.append(step)
    bad = Noted("bad")
    trackers = Trackers([bad, good], heard.append)
    for step in (12, 13, 14):
        trackers.log(LINE, step)
    trackers.finish()
    assert [call[-1] for call in bad.calls] == [12]
    assert good.calls == [12, 13, 14, ("finish",)]
    assert heard == ["report_to noted is left out from here on: ConnectionError: no route"]


@pytest.mark.parametrize("nothing", [[], ["none"], ("none",)])
def test_none_is_none(nothing: list[str], tmp_path: Path):
    trackers = open_trackers(nothing, tmp_path, SETTINGS, silent)
    trackers.log(LINE, 1)
    trackers.finish()
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_one_clear_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match="report_to wandb is not installed: pip install wandb"):
        tracker_classes(["wandb"])
    with pytest.raises(ValueError, match="pip install comet-ml"):
        tracker_classes(["comet_ml"])


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"report_to must be of none, all, .*tensorboard.*wandb.* got 'wanb'"):
        tracker_classes(["wanb"])


def test_all_are_those_that_are_there(noted: list[Noted], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    assert tracker_classes(["all"]) == [Noted, tracking.TensorBoardTracker]


def test_tensorboard_has_the_numbers(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trackers = open_trackers(["tensorboard"], tmp_path / "sft", SETTINGS, silent)
    for step in (10, 20):
        trackers.log({"step": step, "loss": 1 / step, "reward": None}, step)
    trackers.finish()
    events = accumulator.EventAccumulator(str(tmp_path / "sft" / "runs" / "sft")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in (10, 20)
    ]
    assert "reward" not in events.Tags()["scalars"]
