"""Who says which of two completions is better: the judge of a YAML file, or a function of a caller in Python.

The probability that the first is better is its reward, and what is left of 1 that of the second: a tie rewards both
alike, and so does a judge without a verdict. By these rewards alone neither makes a pair.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fastpost.trainers.config import OnlineDpo
from fastpost.trainers.given import GivenPreferences
from fastpost.trainers.rollouts import Rollouts, judged
from fastpost.trainers.world import ALONE, World

if TYPE_CHECKING:
    from fastpost.judging import Preference

NAME = "prefer"  # among the rewards

# (prompts, firsts, seconds, the other columns of the rows) -> a probability or a preference a pair; None: undecided
Prefer = Callable[[Sequence[Any], Sequence[Any], Sequence[Any], Mapping[str, Sequence[Any]]], Sequence[Any]]


def comparer(config: OnlineDpo, given: GivenPreferences) -> Prefer | None:
    """Who compares; None: rewards alone say what is better."""
    prefer = given.get("prefer")
    if (config.judge is not None or prefer is not None) and config.num_generations != 2:
        who = "prefer" if config.judge is None else "judge"
        raise ValueError(f"{who} compares two completions: num_generations must be 2, got {config.num_generations}")
    if config.judge is None:
        return None if prefer is None else lambda prompts, firsts, seconds, _: prefer(prompts, firsts, seconds)
    if prefer is not None:
        raise ValueError(f"one of two compares, judge {config.judge!r} or prefer: leave out one of them")
    from fastpost.judging import load_judge

    return load_judge(config.judge).prefer


def preferred(rollouts: Rollouts, prefer: Prefer, world: World = ALONE) -> Rollouts:
    """With the probability that a completion is the better of its two, added to its rewards."""
    from fastpost.judging import verdict_metrics

    began = time.perf_counter()
    prompts, answers = rollouts.prompts[::2], rollouts.answers
    mine, firsts, seconds = world.slice(prompts), world.slice(answers[::2]), world.slice(answers[1::2])
    names = sorted({name for prompt in mine for name in prompt.columns})
    columns = {name: [prompt.columns.get(name) for prompt in mine] for name in names}
    asked = [prompt.prompt for prompt in mine]
    found = world.gathered(_preferences(prefer(asked, firsts, seconds, columns), len(mine)) if mine else [])
    first = torch.tensor([0.5 if one.p is None else one.p for one in found])
    rewarded = judged(rollouts, NAME, torch.stack([first, 1 - first], 1).flatten(), 1.0, time.perf_counter() - began)
    shown = rewarded.scores.metrics | verdict_metrics(found)
    return replace(rewarded, scores=replace(rewarded.scores, metrics=shown))


def _preferences(said: Sequence[Any], count: int) -> list[Preference]:
    """What was returned, of which some may be numbers."""
    from fastpost.judging import Preference

    if len(said) != count:
        raise ValueError(f"{NAME} must return one probability a pair, got {len(said)} for {count}")
    found = [one if isinstance(one, Preference) else Preference(None if one is None else float(one)) for one in said]
    for i, one in enumerate(found):
        if one.p is not None and not 0 <= one.p <= 1:
            raise ValueError(f"{NAME} must return probabilities, got {one.p} for pair {i}")
    return found
