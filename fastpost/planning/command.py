"""`fastpost plan <verb>`: what a run takes in memory, before anything is loaded."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fastpost.planning.changes import Change, changes
from fastpost.planning.config import Planned
from fastpost.planning.fit import GPUS, by_method, method_of
from fastpost.planning.plans import Survey, surveyed
from fastpost.planning.report import GB, as_json, table
from fastpost.planning.source import architecture, as_stored


def plan(config: Planned) -> None:
    """Prints the plan of a run under each method, and what to change where it does not fit on the GPU it names."""
    gpus = GPUS if config.gpu is None else (config.gpu,)
    with quietly():
        found = architecture(config)
        stored = as_stored(config, found)
        surveys, refused = surveys_of(by_method(stored, in_four_bits=hasattr(found, "quantization_config")))
        shown = as_json(stored, surveys, refused, gpus, _advice(stored, surveys, max(gpus)))
    print(json.dumps(shown, indent=2) if config.json else table(shown), flush=True)


def surveys_of(runs: Mapping[str, Planned]) -> tuple[dict[str, Survey], dict[str, str]]:
    """Of each method; and why there is none of some. ValueError where there is none at all."""
    surveys, refused = {}, {}
    for name, run in runs.items():
        try:
            survey = surveyed(run)
            assert survey.moments  # which acts it out
        except ValueError as error:
            refused[name] = " ".join(str(error).split())
        else:
            surveys[name] = survey
    if not surveys:
        raise ValueError(next(iter(refused.values())))
    return surveys, refused


def _advice(config: Planned, surveys: dict[str, Survey], gpu: int) -> list[Change]:
    own = surveys.get(method_of(config))
    return [] if own is None or own.peak.total <= gpu * GB else changes(own, surveys)


@contextmanager
def quietly() -> Iterator[None]:
    """What libraries warn of, of weights that are not there and of kernels that nobody runs, is no news to a plan."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
