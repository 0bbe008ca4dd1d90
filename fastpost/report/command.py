"""`fastpost report`: the page of a run, beside its metrics."""

from __future__ import annotations

import sys
from pathlib import Path

from fastpost.report.config import Report
from fastpost.report.page import page
from fastpost.report.record import read_record


def report(config: Report) -> None:
    """Writes report.html; its path goes to stdout, what is wrong with the run to stderr."""
    directory = Path(config.run)
    run = read_record(directory)
    target = directory / "report.html"
    target.write_text(page(run), encoding="utf-8")
    for warning in run.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(target)
