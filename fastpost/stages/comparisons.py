"""Pairs of answers that a judge compares by a principle: rows for a reward model, or for DPO.

The probability that the first is better is the mean over both orders (`fastpost.judging`). What is chosen is the one
that is likelier to be better; a row has that probability, and pairs closer to a tie than `confidence` are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from fastpost.data import Prompt
from fastpost.data.chat import rendered
from fastpost.judging import Preference
from fastpost.stages.asking import Asker
from fastpost.stages.groups import Answer
from fastpost.stages.journal import through
from fastpost.stages.jury import Jury
from fastpost.stages.principles import Principle, drawn

# (prompts, firsts, seconds, columns) -> a preference a pair
Prefer = Callable[[Sequence[Any], Sequence[Any], Sequence[Any], Mapping[str, Sequence[Any]]], Sequence[Preference]]


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, and which of them a principle is for."""

    prompt: Prompt
    answers: tuple[Answer, Answer]
    principle: str
    preference: Preference

    @property
    def flipped(self) -> bool | None:
        """Whether the verdict went with the place; None: one of the orders has none."""
        one, other = self.preference.orders
        return None if one is None or other is None else (one > 0.5) != (other > 0.5)

    def row(self, confidence: float) -> dict[str, Any] | None:
        """None: there is nothing to choose."""
        p = self.preference.p
        if p is None or p == 0.5 or max(p, 1 - p) < confidence or self.answers[0].text == self.answers[1].text:
            return None
        chosen, rejected = self.answers if p > 0.5 else self.answers[::-1]
        said = {"chosen": self.prompt.answered(chosen.text), "rejected": self.prompt.answered(rejected.text)}
        row = {"prompt": self.prompt.prompt, **said, **rendered(self.prompt.columns)}
        return row | {"probability": max(p, 1 - p), "principle": self.principle}


def compared(
    asker: Asker,
    prompts: Sequence[Prompt],
    principles: Sequence[Principle],
    prefer: Prefer,
    num_generations: int = 2,  # answers to a prompt, the first and the second a pair, and so on
    jury: Jury | None = None,
) -> list[Pair]:
    """Pairs of answers to each prompt, and what is thought of them."""
    groups = asker.groups(dict(enumerate(prompts)), "pairs", num_generations, jury)
    pairs = [
        (prompt, (group.answers[j], group.answers[j + 1]), drawn(principles, asker.config.seed, f"pair {j}", group.key))
        for prompt, group in zip(prompts, groups, strict=True)
        for j in range(0, num_generations - 1, 2)
    ]

    def work(of: Sequence[int]) -> list[dict[str, Any]]:
        return [asdict(one) for one in _judged(prefer, [pairs[i] for i in of])]

    size = max(1, asker.config.generation_batch_size // 2)
    found = through(asker.journal, "preference", len(pairs), size, work, lambda row: Preference.of(row).answered)
    return [
        Pair(prompt, answers, principle.name, Preference.of(row))
        for (prompt, answers, principle), row in zip(pairs, found, strict=True)
    ]


def _judged(prefer: Prefer, pairs: Sequence[tuple[Prompt, Sequence[Answer], Principle]]) -> Sequence[Preference]:
    """What is said of these."""
    return prefer(
        [prompt.prompt for prompt, _, _ in pairs],
        [prompt.answered(answers[0].text) for prompt, answers, _ in pairs],
        [prompt.answered(answers[1].text) for prompt, answers, _ in pairs],
        {"principle": [principle.prefer for _, _, principle in pairs]},
    )


def report(pairs: Sequence[Pair], confidence: float) -> list[dict[str, Any]]:
    """A line for each principle."""
    lines = []
    for name in Counter(pair.principle for pair in pairs):
        own = [pair for pair in pairs if pair.principle == name]
        rows = [pair.row(confidence) for pair in own]
        flips = [pair.flipped for pair in own if pair.flipped is not None]
        kept = [(pair, row) for pair, row in zip(own, rows, strict=True) if row is not None]
        ahead = [_ahead(pair) for pair, _ in kept if all(answer.reward is not None for answer in pair.answers)]
        lines.append(
            {
                "principle": name,
                "pairs": len(own),
                "kept": len(kept),
                "no verdict": sum(pair.preference.p is None for pair in own),
                "probability": mean(row["probability"] for _, row in kept) if kept else None,
                "flipped": mean(flips) if flips else None,
                "reward ahead": mean(ahead) if ahead else None,
            }
        )
    return lines


def _ahead(pair: Pair) -> float:
    """By how much the chosen answer's reward is above the other's."""
    first, second = (answer.reward or 0.0 for answer in pair.answers)
    return first - second if (pair.preference.p or 0.0) > 0.5 else second - first
