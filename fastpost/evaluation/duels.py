"""Whose answer is better, prompt by prompt: by the rewards that were given, or by a judge, through a journal.

A judge.yaml sees both answers at once, in both orders; any other reward scores each alone, and the higher score wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastpost.data import Prompt
from fastpost.evaluation.config import Eval
from fastpost.evaluation.winning import preference
from fastpost.judging import Panel, Preference
from fastpost.rewards import Reward
from fastpost.stages.groups import Group
from fastpost.stages.journal import Journal, through
from fastpost.stages.jury import Jury

Wins = list[float | None]  # of each prompt: how far the second answer is preferred, 0 to 1; None: nobody knows


def won(
    config: Eval,
    judge: Reward | None,  # None: the rewards
    paths: tuple[str, str],
    names: tuple[str, str],
    first: Sequence[Group],
    second: Sequence[Group],
) -> Wins:
    """By the first answer of each group."""
    if judge is None:
        return [_preferred(a.answers[0].reward, b.answers[0].reward) for a, b in zip(first, second, strict=True)]

    def scored(of: Sequence[int]) -> list[Any]:
        sides = ([groups[i] for i in of] for groups in (first, second))
        scores = [_scored(judge, groups, config.reward_timeout) for groups in sides]
        return [_preferred(x, y) for x, y in zip(*scores, strict=True)]

    def compared(of: Sequence[int]) -> list[Any]:
        assert isinstance(judge.function, Panel)
        return [asdict(one) for one in _compared(judge.function, [first[i] for i in of], [second[i] for i in of])]

    file = Path(config.output_dir) / "wins" / f"{names[1]}-{names[0]}.jsonl"
    journal = Journal(file, {"judge": config.judge, "first": config.facts(paths[0]), "second": config.facts(paths[1])})
    size = config.generation_batch_size
    if not isinstance(judge.function, Panel):
        return through(journal, "wins", len(first), size, scored)
    found = through(journal, "preference", len(first), size, compared, lambda row: Preference.of(row).answered)
    return [row["p"] for row in found]


def _compared(panel: Panel, first: Sequence[Group], second: Sequence[Group]) -> list[Preference]:
    prompts, names = [_prompt(group) for group in first], sorted({name for group in first for name in group.columns})
    earlier, later = (
        [group.answers[0].to(prompt) for prompt, group in zip(prompts, groups, strict=True)]
        for groups in (first, second)
    )
    columns = {name: [group.columns.get(name) for group in first] for name in names}
    return panel.prefer([prompt.prompt for prompt in prompts], later, earlier, columns)


def _scored(judge: Reward, groups: Sequence[Group], timeout: float) -> list[float | None]:
    answers = [group.answers[0] for group in groups]
    ids = [answer.ids or [] for answer in answers]
    judged = Jury([judge], None, timeout).judged([_prompt(group) for group in groups], answers, ids)
    return [answer.reward for answer in judged]


def _preferred(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else preference(first, second)


def _prompt(group: Group) -> Prompt:
    """As a judge needs it: nobody generates from it."""
    return Prompt(group.prompt, [], dict(group.columns))
