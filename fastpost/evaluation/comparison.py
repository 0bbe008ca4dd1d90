"""Two models on the same prompts: by how much each metric differs, whether by chance, and whose answers win."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from fastpost.evaluation.config import Eval
from fastpost.evaluation.duels import Wins, won
from fastpost.evaluation.intervals import Confidence, Estimate
from fastpost.evaluation.samples import Answers
from fastpost.evaluation.significance import holm, mcnemar, paired_bootstrap
from fastpost.evaluation.summary import PROPORTIONS, Column, Summary
from fastpost.evaluation.winning import WinRate, win_rate
from fastpost.rewards import load_reward
from fastpost.stages.groups import Group


@dataclass(frozen=True)
class Difference:
    """second - first, over the prompts that both have a number for."""

    estimate: Estimate
    p: float
    p_holm: float  # among all pairs of models that are compared by this metric


@dataclass(frozen=True)
class Comparison:
    """Of two models."""

    first: str
    second: str
    differences: dict[str, Difference]
    win_rate: WinRate | None  # of the second; None: nobody judged


def difference(name: str, first: Column, second: Column, how: Confidence) -> Difference | None:
    """None: there is no prompt that both have a number for."""
    both = [(x, y) for x, y in zip(first, second, strict=True) if x is not None and y is not None]
    if not both:
        return None
    xs, ys = zip(*both, strict=True)
    estimate, p = paired_bootstrap(xs, ys, how)
    if name in PROPORTIONS:
        p = mcnemar([bool(x) for x in xs], [bool(y) for y in ys])
    return Difference(estimate, p, p)


def _differences(first: Summary, second: Summary, how: Confidence) -> dict[str, Difference]:
    found = {
        name: difference(name, column, second.columns[name], how)
        for name, column in first.columns.items()
        if name in second.columns
    }
    return {name: value for name, value in found.items() if value is not None}


def _win_rate(wins: Wins, first: Sequence[Group], second: Sequence[Group], how: Confidence) -> WinRate | None:
    judged = [
        (win, a.answers[0].tokens, b.answers[0].tokens)
        for win, a, b in zip(wins, first, second, strict=True)
        if win is not None
    ]
    if not judged:
        return None
    known, first_lengths, second_lengths = zip(*judged, strict=True)
    return win_rate(known, first_lengths, second_lengths, how)


def _corrected(found: Sequence[Comparison]) -> list[Comparison]:
    """With p_holm."""
    corrected = [dict(each.differences) for each in found]
    for name in dict.fromkeys(name for each in found for name in each.differences):
        of = [i for i, each in enumerate(found) if name in each.differences]
        for i, p in zip(of, holm([found[i].differences[name].p for i in of]), strict=True):
            corrected[i][name] = replace(corrected[i][name], p_holm=p)
    return [replace(each, differences=differences) for each, differences in zip(found, corrected, strict=True)]


def _check_prompts(a: Answers, b: Answers) -> None:
    """Tokenizers differ, and so does what max_prompt_length leaves out."""
    same = [group.prompt for group in a.greedy] == [group.prompt for group in b.greedy]
    if not same or len(a.refused) != len(b.refused) or len(a.over_refused) != len(b.over_refused):
        raise ValueError(
            f"{a.name} and {b.name} were asked different prompts, as max_prompt_length leaves out what is too long for "
            "one of their tokenizers: raise it"
        )


def compared(answers: Sequence[Answers], summaries: Sequence[Summary], config: Eval) -> list[Comparison]:
    """Every two models."""
    judge = None if config.judge is None or not config.dataset else load_reward(config.judge)
    found = []
    for i, j in combinations(range(len(answers)), 2):
        a, b = answers[i], answers[j]
        _check_prompts(a, b)
        wins = won(config, judge, (config.model[i], config.model[j]), (a.name, b.name), a.greedy, b.greedy)
        differences = _differences(summaries[i], summaries[j], config.intervals)
        winner = _win_rate(wins, a.greedy, b.greedy, config.intervals)
        found.append(Comparison(a.name, b.name, differences, winner))
    return _corrected(found)
