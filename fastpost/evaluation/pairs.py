"""How often a reward prefers the better answer of a pair, by the lengths and the formats of the two.

A reward that has learnt "longer is better" is right where the better answer is longer and wrong where it is shorter;
the mean over both hides it (arXiv:2310.03716). So with headings, lists and bold print (arXiv:2409.11704).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastpost.data import check_columns, split_pair
from fastpost.evaluation.intervals import Confidence, Estimate, proportion
from fastpost.evaluation.winning import preference
from fastpost.files import read_rows
from fastpost.rewards import Reward, score
from fastpost.rewards.texts import text_of
from fastpost.stages.journal import Journal, through

FORMATTED = re.compile(r"^\s{0,3}(?:#{1,6} |[-*+] |\d+[.)] |```|>|\|)|\*\*[^*\n]+\*\*", re.MULTILINE)
LONGER = (  # the better answer's length / the worse one's, characters
    ("much shorter", 0.0, 0.5), ("shorter", 0.5, 0.9), ("as long", 0.9, 1 / 0.9),
    ("longer", 1 / 0.9, 2.0), ("much longer", 2.0, float("inf")),
)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """A pair, and what the reward thinks of its answers."""

    chosen: str
    rejected: str
    right: float  # 1: the better answer has the higher score, 1/2: both have one


@dataclass(frozen=True)
class PairAccuracy:
    """Of one reward. Kinds without pairs are left out."""

    accuracy: Estimate
    by_length: dict[str, Estimate]
    by_format: dict[str, Estimate]
    longer: float  # accuracy of "the longer one is better", for comparison


def length_kind(chosen: str, rejected: str) -> str:
    """How long the better answer is, beside the worse one."""
    ratio = (len(chosen) + 1) / (len(rejected) + 1)  # an empty one has a length to divide by
    return next(name for name, low, high in LONGER if low <= ratio < high)


def format_kind(chosen: str, rejected: str) -> str:
    """Which of the two has more lines of a list, headings, code and the like."""
    more = len(FORMATTED.findall(chosen)) - len(FORMATTED.findall(rejected))
    if more:
        return "better one has more formatting" if more > 0 else "better one has less formatting"
    return "both formatted" if FORMATTED.search(chosen) else "both plain"


def pair_accuracy(pairs: Sequence[Judged], how: Confidence) -> PairAccuracy:
    return PairAccuracy(
        _share(pairs, how),
        _by_kind(pairs, [length_kind(p.chosen, p.rejected) for p in pairs], [name for name, _, _ in LONGER], how),
        _by_kind(pairs, [format_kind(p.chosen, p.rejected) for p in pairs], None, how),
        sum(preference(len(p.rejected), len(p.chosen)) for p in pairs) / len(pairs),
    )


def _by_kind(
    pairs: Sequence[Judged], kinds: Sequence[str], order: Sequence[str] | None, how: Confidence
) -> dict[str, Estimate]:
    names = sorted(set(kinds)) if order is None else [name for name in order if name in kinds]
    return {
        name: _share([pair for pair, kind in zip(pairs, kinds, strict=True) if kind == name], how) for name in names
    }


def _share(pairs: Sequence[Judged], how: Confidence) -> Estimate:
    return proportion(sum(pair.right for pair in pairs), len(pairs), how)


def judged_pairs(path: str, reward: Reward, journal: Journal, size: int, timeout: float) -> list[Judged]:
    """The pairs of a file that the reward applies to; so many are judged at a time, and kept in the journal."""
    rows = read_rows(path)
    check_columns(rows, "reward", path)
    parts = [split_pair(row, f"{path}, row {i}") for i, row in enumerate(rows)]
    names = sorted({name for row in rows for name in row} - {"prompt", "chosen", "rejected"})

    def work(of: Sequence[int]) -> list[Any]:
        columns = {name: [rows[i].get(name) for i in of] * 2 for name in names}
        answers = [parts[i][side] for side in (1, 2) for i in of]
        asked = [parts[i][0] for i in of] * 2
        found = score([reward], None, asked, answers, [[]] * len(asked), columns, timeout=timeout).rewards.tolist()
        known = [None if value != value else value for value in found]
        return list(zip(known[: len(of)], known[len(of) :], strict=True))

    scores = through(journal, reward.name, len(rows), size, work)
    found = [
        Judged(text_of(chosen), text_of(rejected), preference(low, high))
        for (_, chosen, rejected), (high, low) in zip(parts, scores, strict=True)
        if high is not None and low is not None
    ]
    if not found:
        raise ValueError(f"reward {reward.name!r} applies to no pair of {path}: there is nothing to count")
    return found
