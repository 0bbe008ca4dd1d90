"""Known failures of a run, told from its metrics.jsonl in plain words: what is seen, and what usually helps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fastpost.watching import levels, trends
from fastpost.watching.advice import ADVICE
from fastpost.watching.curves import Found, Line, Run

CHECKS: Mapping[str, Callable[[Run], Found]] = {
    "not a number": levels.not_a_number,
    "gradient explodes": levels.gradient_explodes,
    "KL beyond the budget": levels.kl_beyond_budget,
    "reward is length": trends.reward_is_length,
    "entropy collapse": levels.entropy_collapse,
    "groups without variance": levels.no_variance,
    "completions do not end": levels.completions_do_not_end,
    "much is clipped": levels.much_is_clipped,
    "sampler mismatch": levels.sampler_mismatch,
    "critic explains nothing": levels.critic_explains_nothing,
    "both log-probabilities fall": trends.both_fall,
    "judge goes by place": levels.judge_goes_by_place,
    "no better than a coin": levels.no_better_than_a_coin,
    "overfits": trends.overfits,
}


@dataclass(frozen=True)
class RunWarning:
    name: str
    step: int  # at which it was first seen
    seen: str  # a sentence, with the numbers
    helps: str  # and what usually does

    def __str__(self) -> str:
        return f"{self.name}, from step {self.step}: {self.seen} {self.helps}"


def warnings(
    lines: Sequence[Line],  # of metrics.jsonl
    verb: str = "",  # some metrics mean something else in another verb
    target_kl: float | None = None,  # nats a completion, of an adaptive KL coefficient; its double is then the budget
) -> list[RunWarning]:
    """What is wrong with a run, the gravest first."""
    run = Run(lines, verb, target_kl)
    found = {name: check(run) for name, check in CHECKS.items()}
    return [RunWarning(name, int(at[0]), at[1], ADVICE[name]) for name, at in found.items() if at is not None]
