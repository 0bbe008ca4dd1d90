"""`fastpost plan <verb>`: what a run takes in memory, before anything is loaded."""

from __future__ import annotations

import json

from fastpost.planning.config import Planned
from fastpost.planning.fit import GPUS, by_method, changes, method_of, surveyed
from fastpost.planning.report import GB, as_json, table


def plan(config: Planned) -> None:
    """Prints the plan of a run under each method, and what to change where it does not fit on the GPU it names."""
    gpus = GPUS if config.gpu is None else (config.gpu,)
    surveys = {name: surveyed(run) for name, run in by_method(config).items()}
    own = surveys[method_of(config)]
    fits = own.peak(own.demand.tokens).total <= max(gpus) * GB
    found = as_json(config, surveys, gpus, [] if fits else changes(config, own))
    print(json.dumps(found, indent=2) if config.json else table(found))
