"""One judge, or several: pairs -> preferences, answers -> scores, and the two as reward functions use them.

A pair is asked about in both orders (arXiv:2306.05685: the place sways the verdict), each as often as `votes` says. Of
several judges the mean counts, of those that came to a verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpost.judging.asking import Ask, Cache, replies
from fastpost.judging.spec import JudgeSpec
from fastpost.judging.verdicts import UNDECIDED, Preference, Score, Vote, mean, preference, score, vote_of
from fastpost.judging.wording import Request, compare, grade, reminded
from fastpost.trainers.log import say

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Judge:
    """Who is asked by which file."""

    spec: JudgeSpec
    ask: Ask
    cache: Cache

    def prefer(
        self, prompts: Sequence[Any], firsts: Sequence[Any], seconds: Sequence[Any], columns: Columns
    ) -> list[Preference]:
        """Of each pair."""
        votes, requests = range(self.spec.votes), []
        for i, (prompt, first, second) in enumerate(zip(prompts, firsts, seconds, strict=True)):
            row = _row(columns, i)
            requests += [compare(self.spec, prompt, first, second, row, vote) for vote in votes]
            if self.spec.both_orders:
                requests += [compare(self.spec, prompt, second, first, row, vote) for vote in votes]
        each = self.spec.votes * (2 if self.spec.both_orders else 1)
        cast = self._votes(requests)
        return [preference(v[: len(votes)], v[len(votes) :]) for v in _parts(cast, each)]

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Columns) -> list[Score]:
        """Of each answer."""
        requests = [
            grade(self.spec, prompt, answer, _row(columns, i), vote)
            for i, (prompt, answer) in enumerate(zip(prompts, completions, strict=True))
            for vote in range(self.spec.votes)
        ]
        return [score(v, self.spec.scale) for v in _parts(self._votes(requests), self.spec.votes)]

    def _votes(self, requests: Sequence[Request]) -> list[Vote]:
        """Whoever answers without a verdict is asked for it again."""
        requests = list(requests)
        given = replies(self.ask, self.cache, requests)
        votes = [vote_of(reply, request, self.spec.soft) for reply, request in zip(given, requests, strict=True)]
        for _ in range(self.spec.reasks):
            left = [i for i, vote in enumerate(votes) if vote.error == UNDECIDED]
            for i in left:
                requests[i] = reminded(requests[i], given[i].text)
            for i, reply in zip(left, replies(self.ask, self.cache, [requests[i] for i in left]), strict=True):
                given[i], votes[i] = reply, vote_of(reply, requests[i], self.spec.soft)
        return votes


@dataclass(frozen=True)
class Panel:
    """The judges of a file; called, a reward function of TRL's signature."""

    judges: Sequence[Judge]

    def prefer(
        self,
        prompts: Sequence[Any],
        firsts: Sequence[Any],
        seconds: Sequence[Any],
        columns: Columns | None = None,  # that the rubrics name
    ) -> list[Preference]:
        """What they think of each pair together."""
        found = [judge.prefer(prompts, firsts, seconds, columns or {}) for judge in self.judges]
        _tell(error for each in found for one in each for error in one.errors)
        return [_together(each) for each in zip(*found, strict=True)]

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Columns | None = None) -> list[Score]:
        """What they think of each answer together."""
        found = [judge.score(prompts, completions, columns or {}) for judge in self.judges]
        _tell(error for each in found for one in each for error in one.errors)
        return [
            Score(mean(one.value for one in each), tuple(error for one in each for error in one.errors))
            for each in zip(*found, strict=True)
        ]

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Scores on [0, 1]; None where nobody came to a verdict."""
        rows = {name: values for name, values in columns.items() if name not in ("trainer_state", "log_extra")}
        found = self.score(prompts, completions, rows)
        if log_metric is not None:
            log_metric("judge/missing_votes", sum(len(one.errors) for one in found) / max(1, len(found)))
        return [one.value for one in found]


def _row(columns: Columns, i: int) -> dict[str, Any]:
    return {name: values[i] for name, values in columns.items()}


def _parts(votes: Sequence[Vote], size: int) -> list[tuple[Vote, ...]]:
    """Those of each pair, or of each answer."""
    return [tuple(votes[i : i + size]) for i in range(0, len(votes), size)]


def _together(each: Sequence[Preference]) -> Preference:
    votes = [one.votes for one in each]
    return Preference(
        mean(one.p for one in each),
        (sum(v[0] for v in votes), sum(v[1] for v in votes), sum(v[2] for v in votes)),
        (mean(one.orders[0] for one in each), mean(one.orders[1] for one in each)),
        tuple(error for one in each for error in one.errors),
    )


def _tell(errors: Iterable[str]) -> None:
    """Nothing is lost in silence."""
    counts = Counter(errors)
    if counts:
        said = ", ".join(f"{count} times: {error}" for error, count in counts.most_common(3))
        say(f"judge: {counts.total()} votes are missing ({said})")
