"""Experiment trackers: accelerate's own classes, by the names of transformers' report_to.

A tracker that is not installed, or does not start, is an error before anything is trained. One that fails later is
dropped, and that is said: what watches a run does not end it. Only the main process opens any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpost.watching.curves import Line, is_number

# Where pip's name is not the tracker's.
PACKAGES = {"comet_ml": "comet-ml"}
# How a tracker's own init calls the name of a run; accelerate gives it the project alone.
RUN_NAME = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}


class Trackers:
    """Lines of metrics to everyone who wants them."""

    def __init__(self, trackers: Sequence[Any], say: Callable[[str], None]):
        self._trackers, self._say = list(trackers), say

    def log(self, line: Line, step: int) -> None:
        """The numbers of a line."""
        values = {name: value for name, value in line.items() if name != "step" and is_number(value)}
        for tracker in list(self._trackers):
            self._tried(tracker, lambda tracker=tracker: tracker.log(values, step=step))

    def finish(self) -> None:
        for tracker in list(self._trackers):
            self._tried(tracker, tracker.finish)
        self._trackers = []

    def _tried(self, tracker: Any, call: Callable[[], None]) -> None:
        """A tracker is others' code and others' network, so anything may come out of it."""
        try:
            call()
        except Exception as error:
            self._trackers.remove(tracker)
            self._say(f"report_to {tracker.name} is left out from here on: {type(error).__name__}: {error}")


def open_trackers(
    report_to: Sequence[str],  # "none", "all" that are installed, or names
    directory: Path,  # of the run; trackers that write files do so in runs/
    settings: Mapping[str, Any],  # of the run
    say: Callable[[str], None],
    *,
    project: str = "fastpost",
    run_name: str | None = None,  # default: that of the directory
) -> Trackers:
    """The trackers, started and told the settings."""
    name = run_name or directory.resolve().name
    kinds, opened = tracker_classes(report_to), []
    if kinds:
        from accelerate import PartialState

        PartialState()  # without it accelerate's logger, which some of them speak through, raises
    for kind in kinds:
        given = {RUN_NAME[kind.name]: name} if kind.name in RUN_NAME else {}
        if kind.requires_logging_directory:
            tracker = kind(name, str(directory / "runs"), **given)
        else:
            tracker = kind(project, **given)
        tracker.start()
        tracker.store_init_configuration({key: _plain(value) for key, value in settings.items()})
        opened.append(tracker)
    return Trackers(opened, say)


def tracker_classes(report_to: Sequence[str]) -> list[Any]:
    """accelerate's classes; ValueError for a name that is none, or of what is not installed. Asked before all else."""
    if list(report_to) in ([], ["none"]):
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    installed = {str(tracker) for tracker in get_available_trackers()}
    # What a user registered with accelerate is here already; the others are its own.
    registered = LOGGER_TYPE_TO_CLASS.keys() - {str(tracker) for tracker in LoggerType}
    names = sorted(installed | registered) if list(report_to) == ["all"] else list(dict.fromkeys(report_to))
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(["none", "all", *sorted(LOGGER_TYPE_TO_CLASS)])
            raise ValueError(f"report_to must be of {known}, got {name!r}")
        if name not in installed | registered:
            raise ValueError(f"report_to {name} is not installed: pip install {PACKAGES.get(name, name)}")
    return [LOGGER_TYPE_TO_CLASS[name] for name in names]


def _plain(value: Any) -> Any:
    """TensorBoard takes no null and no list."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return value if isinstance(value, bool | int | float | str) else "none" if value is None else str(value)
