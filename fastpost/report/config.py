"""What `fastpost report` is told."""

from __future__ import annotations

from dataclasses import dataclass

from fastpost.trainers.config import RUN
from fastpost.trainers.options import REQUIRED, option, read_fields


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run as one self-contained HTML page: curves, warnings, samples, where time goes."""

    run: str = option(REQUIRED, RUN, "output_dir of a run; report.html is written there")

    def __post_init__(self) -> None:
        read_fields(self)
