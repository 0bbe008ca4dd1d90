"""What a judge's verdicts on pairs say of the judge: a report as JSON, as a table, and in the log of a run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from fastpost.judging.agreement import Number, accuracy, kappa
from fastpost.judging.bias import itself, length, place
from fastpost.judging.pairs import Judged
from fastpost.judging.verdicts import Preference, Winner
from fastpost.judging.wording import as_text

SAID = {
    ("agreement", "accuracy"): "the label's winner",
    ("agreement", "kappa"): "Cohen's kappa with the labels",
    ("place", "flips"): "the winner turns with the order",
    ("place", "first_place_wins"): "the answer in first place wins",
    ("length", "longer_wins"): "the longer answer wins",
    ("length", "longer_wins_by_label"): "the longer answer wins, by the labels",
    ("length", "slope"): "log-odds a doubling of the length",
    ("itself", "wins"): "the judge's own answer wins",
    ("itself", "wins_by_label"): "the judge's own answer wins, by the labels",
    ("itself", "accuracy"): "the label's winner, where one answer is its own",
    ("itself", "accuracy_elsewhere"): "the label's winner, elsewhere",
}


def reported(pairs: Sequence[Judged], found: Sequence[Preference | None], own: Collection[str]) -> dict[str, Any]:
    """All numbers; None for a pair that nobody answered about."""
    there = [(pair, one) for pair, one in zip(pairs, found, strict=True) if one is not None]
    preferences = [one for _, one in there]
    labels: list[Winner | None] = [pair.label for pair, _ in there]
    lengths = [(len(as_text(pair.first)), len(as_text(pair.second))) for pair, _ in there]
    mine = [(pair.authors[0] in own, pair.authors[1] in own) for pair, _ in there]
    both = [(one.winner, label) for one, label in zip(preferences, labels, strict=True) if one.winner and label]
    judged, known = [one for one, _ in both], [label for _, label in both]
    by_itself = itself(preferences, labels, mine)
    winners = [one.winner for one in preferences]
    return {
        "pairs": len(pairs),
        "decided": len(winners) - winners.count(None),
        "ties": winners.count("tie"),
        "undecided": winners.count(None),
        "unanswered": len(pairs) - len(there),
        "agreement": {"accuracy": _json(accuracy(judged, known)), "kappa": _json(kappa(judged, known))},
        "place": asdict(place(preferences)),
        "length": asdict(length(preferences, labels, lengths)),
        "itself": None if by_itself is None else asdict(by_itself),
    }


def verdict_metrics(found: Sequence[Preference]) -> dict[str, float]:
    """Of a step of a run. judge/ties, undecided: shares of the pairs; missing_votes: a pair; flips, first_place_wins:
    as in a report, where pairs were judged in both orders."""
    if not found:
        return {}
    winners, swayed = [one.winner for one in found], place(found)
    shares = {"flips": swayed.flips, "first_place_wins": swayed.first_place_wins}
    return {
        "judge/ties": winners.count("tie") / len(found),
        "judge/undecided": winners.count(None) / len(found),
        "judge/missing_votes": sum(len(one.errors) for one in found) / len(found),
        **{f"judge/{name}": number.value for name, number in shares.items() if number is not None},
    }


def lines(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each number that there is."""
    numbers = [(said, (report[part] or {}).get(name)) for (part, name), said in SAID.items()]
    return [{"": said, "value": n["value"], "± se": n["se"], "pairs": n["n"]} for said, n in numbers if n is not None]


def _json(number: Number | None) -> dict[str, Any] | None:
    return None if number is None else asdict(number)
