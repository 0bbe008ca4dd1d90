"""Of the verb that learns which steps of a solution are right."""

from __future__ import annotations

from dataclasses import dataclass

from fastpost.trainers.config.groups import DATA, STEPS
from fastpost.trainers.config.preference import Preference
from fastpost.trainers.options import option


@dataclass(frozen=True, kw_only=True)
class Prm(Preference):
    """A process reward model: a scalar head that says how probably each step is right. arXiv:2305.20050"""

    max_length: int | None = option(1024, DATA, "tokens of a prompt and its steps; cut at the end", above=1)
    step_separator: str = option("\n", DATA, "text behind each step; a label lies on its last token; \\n: a new line")
    train_on_last_step_only: bool = option(False, DATA, "of each solution the last label alone, an outcome")
    learning_rate: float = option(1e-5, STEPS, "peak of the schedule", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "step_separator", self.step_separator.replace("\\n", "\n"))
        if not self.step_separator:
            raise ValueError("step_separator must be a text, a new line say, got an empty one")
