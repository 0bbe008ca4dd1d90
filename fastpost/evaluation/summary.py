"""One model's answers -> a number a prompt for each metric, and these -> estimates.

  proportions   yes or no of one answer a prompt: Wilson's interval, McNemar's test
  the others    a number that is made of several samples or tokens: the bootstrap over prompts

A prompt that a metric does not apply to (nobody judged an answer, nothing to count) is left out of that metric, and its
estimate says of how many prompts it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

from fastpost.evaluation import diversity
from fastpost.evaluation.calibration import Calibration, calibration
from fastpost.evaluation.config import Eval
from fastpost.evaluation.divergence import Measured
from fastpost.evaluation.extraction import Extract
from fastpost.evaluation.intervals import Confidence, Estimate, mean, proportion
from fastpost.evaluation.passing import pass_at_k
from fastpost.evaluation.samples import Answers
from fastpost.evaluation.voting import maj_at_k, share
from fastpost.stages.groups import Answer, Group

Column = list[float | None]  # a prompt each
Columns = dict[str, Column]

PROPORTIONS = {"accuracy", "finished", "refusal", "over_refusal"}


@dataclass(frozen=True)
class Summary:
    """One model."""

    name: str
    columns: Columns
    estimates: dict[str, Estimate]
    calibration: dict[str, Calibration]  # by where the confidence is from


def summary(answers: Answers, config: Eval, extract: Extract) -> Summary:
    columns = columns_of(answers, config, extract)
    found = {name: estimate(name, column, config.intervals) for name, column in columns.items()}
    estimates = {name: value for name, value in found.items() if value is not None}
    return Summary(answers.name, columns, estimates, calibrations(answers, config, extract))


def estimate(name: str, column: Column, how: Confidence) -> Estimate | None:
    """None: it applies to no prompt."""
    known = [value for value in column if value is not None]
    if not known:
        return None
    return proportion(sum(known), len(known), how) if name in PROPORTIONS else mean(known, how)


def columns_of(answers: Answers, config: Eval, extract: Extract) -> Columns:
    """By metric, in the order in which a table has them."""
    found = _of_greedy(answers, config) if answers.greedy else {}
    if answers.sampled:
        found |= _of_samples(answers, config) | _at_k(answers, config, extract)
        found |= _spread(answers)
    refusals = {"refusal": answers.refused, "over_refusal": answers.over_refused}
    for name, said in refusals.items():
        if said:
            found[name] = [None if value is None else float(value) for value in said]
    return found


def right(answer: Answer, config: Eval) -> float | None:
    """1 or 0, by the first reward; None: it did not judge."""
    first = None if answer.rewards is None else next(iter(answer.rewards.values()))
    return None if first is None else float(first > config.right_above)


# ---- columns ----


def _of_greedy(answers: Answers, config: Eval) -> Columns:
    first = [group.answers[0] for group in answers.greedy]
    counts: Columns = {name: [_count(name, answer) for answer in first] for name in _counted(answers.greedy)}
    return {
        "accuracy": [right(answer, config) for answer in first],
        "reward": [answer.reward for answer in first],
        "tokens": [float(answer.tokens) for answer in first],
        "finished": [float(answer.finished) for answer in first],
        **counts,
    }


def _counted(groups: Sequence[Group]) -> tuple[str, ...]:
    """What is counted of conversations; nothing where an answer is one turn."""
    several = any(answer.events for group in groups for answer in group.answers)
    return ("turns", "calls", "failures") if several else ()


def _count(name: str, answer: Answer) -> float:
    return float((answer.events or {}).get(name, 0))


def _of_samples(answers: Answers, config: Eval) -> Columns:
    def averaged(value: Callable[[Answer], float | None]) -> Column:
        return [_mean([value(answer) for answer in group.answers]) for group in answers.sampled]

    return {
        "sampled/accuracy": averaged(lambda answer: right(answer, config)),
        "sampled/reward": averaged(lambda answer: answer.reward),
        "sampled/tokens": averaged(lambda answer: float(answer.tokens)),
        "sampled/finished": averaged(lambda answer: float(answer.finished)),
    } | {f"sampled/{name}": averaged(partial(_count, name)) for name in _counted(answers.sampled)}


def _at_k(answers: Answers, config: Eval, extract: Extract) -> Columns:
    """pass@k and maj@k, of prompts all of whose samples were judged."""
    found: Columns = {f"{name}@{k}": [] for name in ("pass", "maj") for k in config.ks}
    for group in answers.sampled:
        verdicts, votes = _verdicts(group, config), _votes(group, extract)
        for k in config.ks:
            n = len(group.answers)
            found[f"pass@{k}"].append(None if verdicts is None else pass_at_k(n, round(sum(verdicts)), k))
            found[f"maj@{k}"].append(None if verdicts is None else maj_at_k(votes, verdicts, k))
    return found


def _spread(answers: Answers) -> Columns:
    """Diversity of the samples, their entropy, and how far they are from the reference."""
    texts = [[answer.text for answer in group.answers] for group in answers.sampled]
    said = [[diversity.words(text) for text in group] for group in texts]
    several = len(texts[0]) > 1
    found: Columns = {f"distinct_{n}": [diversity.distinct(group, n) for group in said] for n in (1, 2)}
    if several:
        found["self_bleu"] = [diversity.self_bleu(group) for group in said]
        found["unique"] = [diversity.unique(group) for group in texts]
    tokens = [sum(answer.tokens for answer in group.answers) for group in answers.sampled]
    entropy = [sum(each.entropy for each in group) for group in answers.sampled_measured]
    found["entropy"] = [total / n for total, n in zip(entropy, tokens, strict=True)]
    found["kl"] = [_mean([each.kl for each in group]) for group in answers.sampled_measured]
    return found


# ---- calibration ----


def calibrations(answers: Answers, config: Eval, extract: Extract) -> dict[str, Calibration]:
    """vote: the share of the samples that gave the most frequent answer, and whether that is right. probability: that
    of the whole greedy answer, and whether it is."""
    voted = [
        (share(votes), maj_at_k(votes, verdicts, len(votes)))
        for group in answers.sampled
        if (verdicts := _verdicts(group, config)) is not None
        for votes in [_votes(group, extract)]
    ]
    probable = [
        (_probability(each[0]), verdict)
        for group, each in zip(answers.greedy, answers.greedy_measured, strict=True)
        if (verdict := right(group.answers[0], config)) is not None
    ]
    found = {"vote": voted, "probability": probable}
    return {name: _calibration(pairs, config.calibration_bins) for name, pairs in found.items() if pairs}


def _calibration(pairs: Sequence[tuple[float, float]], bins: int) -> Calibration:
    confidences, verdicts = zip(*pairs, strict=True)
    return calibration(confidences, verdicts, bins)


def _probability(measured: Measured) -> float:
    return min(1.0, math.exp(measured.logp))


def _verdicts(group: Group, config: Eval) -> list[float] | None:
    """None: not all of its answers were judged."""
    found = [right(answer, config) for answer in group.answers]
    known = [verdict for verdict in found if verdict is not None]
    return known if len(known) == len(found) else None


def _votes(group: Group, extract: Extract) -> list[Hashable | None]:
    return [extract(answer.last) for answer in group.answers]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
