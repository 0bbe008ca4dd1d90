"""Of all verbs whose policy samples, and is told how good that was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastpost.trainers.config.conversing import Conversing
from fastpost.trainers.config.drawn import Engined, Rewarded
from fastpost.trainers.config.groups import DATA, ROLLOUT, STEPS
from fastpost.trainers.config.training import Training
from fastpost.trainers.options import option


@dataclass(frozen=True, kw_only=True)
class Sampled(Training, Rewarded, Engined, Conversing):
    """What these verbs are told besides."""

    learning_rate: float = option(1e-6, STEPS, "peak of the schedule", least=0)
    max_prompt_length: int | None = option(None, DATA, "tokens; rows with a longer prompt are left out", above=0)

    num_generations: int = option(1, ROLLOUT, "completions of a prompt, a group", least=1)
    mask_truncated_completions: bool = option(False, ROLLOUT, "leave completions that did not end out of the loss")
    soft_punish_cache: int | None = option(
        None,
        ROLLOUT,
        "take up to 1 from the reward of a completion by how far it is into the last so many tokens of "
        "max_completion_length (DAPO's soft overlong punishment)",
        least=0,
    )
    missing_eos_penalty: float | None = option(
        None, ROLLOUT, "taken from the reward of a completion that did not end", above=0
    )

    rewards_steps: ClassVar[bool] = False  # whether a reward may give a number to every step
    rows_are_completions: ClassVar[bool] = True  # else each is a prompt, with all of its completions
    updates_field: ClassVar[str] = ""  # the field that multiplies optimizer steps on the same rollouts

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows_are_completions:
            check_groups(self)
        self.backend  # noqa: B018  # what does not go together is refused there
        if self.max_steps > 0 and self.max_steps % self.updates_per_round:
            above = self.max_steps + -self.max_steps % self.updates_per_round
            raise ValueError(
                f"max_steps must be a multiple of {self.updates_field} {self.updates_per_round}, so that the last "
                f"rollouts are used up: got {self.max_steps}, try {above}"
            )

    @property
    def updates_per_round(self) -> int:
        """Optimizer steps on the same rollouts; files are written between rollouts."""
        return 1

    @property
    def rows_per_round(self) -> int:
        """Completions that are sampled together, a process."""
        return self.rows_per_step


def check_groups(config: Sampled) -> None:
    """A step must hold whole groups, and several microbatches must not each hold a part of one."""
    rows, group = config.rows_per_step, config.num_generations
    if rows % group:
        below, above = rows - rows % group, rows + -rows % group
        sizes = " or ".join(str(size) for size in (below, above) if size)
        divisors = [d for d in range(2, rows + 1) if rows % d == 0]
        fits = f"; or num_generations {', '.join(map(str, divisors))}" if divisors else ""
        raise ValueError(
            f"per_device_train_batch_size {config.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{config.gradient_accumulation_steps} = {rows} completions a step must be a multiple of num_generations "
            f"{group}: make it {sizes}{fits}"
        )
