"""What `fastpost report` is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastpost.trainers.config import RUN
from fastpost.trainers.options import REQUIRED, option, read_fields

DIRECTORY = option(REQUIRED, RUN, "output_dir of a run; report.html is written there").metadata


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run as one self-contained page of HTML: curves, warnings, samples, where time goes."""

    run: str = field(default=REQUIRED, metadata={**DIRECTORY, "positional": True})

    def __post_init__(self) -> None:
        read_fields(self)
