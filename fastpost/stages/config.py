"""What every stage is told that asks a policy."""

from __future__ import annotations

from dataclasses import dataclass

from fastpost.trainers.config import DATA, ROLLOUT, RUN, Engined, Loaded, Rewarded
from fastpost.trainers.options import REQUIRED, option, read_fields


@dataclass(frozen=True, kw_only=True)
class Asking(Loaded, Engined):
    """A policy, prompts, and how it is asked."""

    dataset: str = option("", DATA, ".jsonl, .json or .parquet file, or a directory saved by datasets", needed=True)
    max_prompt_length: int | None = option(None, DATA, "tokens; rows with a longer prompt are left out", above=0)
    temperature: float = option(1.0, ROLLOUT, "of sampling; 0: the likeliest token", least=0)
    output_dir: str = option(REQUIRED, RUN, "receives what was made; the same command again goes on from what is there")
    seed: int = option(42, RUN, "of everything random", least=0)

    def __post_init__(self) -> None:
        read_fields(self)
        self.backend  # noqa: B018  # what does not go together is refused there


@dataclass(frozen=True, kw_only=True)
class Judging(Asking, Rewarded):
    """And how its answers are judged."""


@dataclass(frozen=True, kw_only=True)
class BestOfN(Judging):
    """The best of N answers to each prompt, by any reward: a data set, and the score against N."""

    num_generations: int = option(16, ROLLOUT, "N, answers to a prompt", above=0)
