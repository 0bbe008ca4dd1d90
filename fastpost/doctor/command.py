"""`fastpost doctor DATA`: what a data set is, and whether training on it would be sound."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastpost.data import Verb
from fastpost.doctor.checks import overlap
from fastpost.doctor.columns import describe, foreign, oddities, usable
from fastpost.doctor.config import Doctor
from fastpost.doctor.readings import Source, readings
from fastpost.doctor.report import Findings, as_json, text
from fastpost.files import Rows, read_rows
from fastpost.models.loading import load_tokenizer
from fastpost.models.trunk import positions_of


def doctor(config: Doctor) -> None:
    """Prints what was found; SystemExit(1) where training would be unsound for the verb asked for, or for all."""
    try:
        rows = read_rows(config.dataset)
    except ValueError as error:
        if not Path(config.dataset).expanduser().exists():
            raise
        print(json.dumps({"dataset": config.dataset, "sound": [], "broken": str(error)}) if config.json else error)
        raise SystemExit(1) from None
    found = examined(rows, config)
    if config.json:
        print(json.dumps(as_json(found), indent=2, ensure_ascii=False))
    else:
        print(text(found, color=sys.stdout.isatty()))
    if not found.sound:
        raise SystemExit(1)


def examined(rows: Rows, config: Doctor) -> Findings:
    """All that can be known of the rows, for one verb or for all."""
    held_out = None if config.eval_dataset is None else read_rows(config.eval_dataset)
    fits = _usable(rows, held_out, config)
    source = None
    if config.model is not None:
        tokenizer, model = load_tokenizer(config.model, config.trust_remote_code)
        source = Source(rows, tokenizer, positions_of(model), config)
    return Findings(
        path=config.dataset,
        rows=len(rows),
        columns=describe(rows),
        foreign=[] if None in fits.values() else foreign(rows),
        usable=fits,
        oddities=oddities(rows),
        overlap=None if held_out is None else overlap(rows, held_out),
        readings=source and readings(source, [verb for verb, reason in fits.items() if reason is None]),
        max_length=config.max_length,
        tokenizer=source and source.tokenizer,
    )


def _usable(rows: Rows, held_out: Rows | None, config: Doctor) -> dict[Verb, str | None]:
    """What speaks against each verb that is asked about: in the rows to train on, or else in those held out."""
    fits = usable(rows, config.dataset)
    later = {} if held_out is None else usable(held_out, config.eval_dataset or "")
    for verb, reason in later.items():
        fits[verb] = fits[verb] or (reason and f"eval_dataset: {reason}")
    return fits if config.verb == "any" else {config.verb: fits[config.verb]}
