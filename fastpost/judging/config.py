"""What `fastpost judge` is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastpost.trainers.config import DATA, RUN
from fastpost.trainers.options import REQUIRED, option, read_fields

PAIRS = option(REQUIRED, DATA, "pairs: (prompt,) chosen, rejected; or prompt, first, second and maybe label").metadata


@dataclass(frozen=True, kw_only=True)
class JudgePairs:
    """A judge compares the answers of pairs, and is itself compared with the labels that they have."""

    dataset: str = field(default=REQUIRED, metadata={**PAIRS, "positional": True})
    judge: str = option(REQUIRED, DATA, "YAML file of a judge, or of a list of them")
    own: str | None = option(
        None, DATA, "who the judge is in the columns chosen_model and rejected_model, or first_model and second_model"
    )
    output_dir: str = option(REQUIRED, RUN, "receives what was found; the same command again goes on from there")
    batch_size: int = option(64, RUN, "pairs asked about together; they are kept when all of them are done", above=0)
    seed: int = option(42, RUN, "of the coin that says whether the chosen answer is named first", least=0)

    def __post_init__(self) -> None:
        read_fields(self)
