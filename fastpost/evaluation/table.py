"""A report as text: models side by side, their differences, who wins, and what rewards think of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastpost.evaluation.comparison import Comparison, Difference
from fastpost.evaluation.intervals import Estimate
from fastpost.evaluation.pairs import PairAccuracy
from fastpost.evaluation.summary import Summary

SIGNIFICANT = 0.05
UNITS = {"entropy": "nats a token", "kl": "nats an answer"}


def table(summaries: Sequence[Summary], comparisons: Sequence[Comparison], pairs: Mapping[str, PairAccuracy]) -> str:
    """Everything there is, a table after another."""
    parts = []
    if summaries:
        parts.append(_models(summaries))
    if comparisons:
        parts.append(_differences(comparisons))
        parts += [line for each in comparisons if (line := _winner(each))]
    parts += [_of_reward(name, found) for name, found in pairs.items()]
    return "\n\n".join(parts)


def number(value: float) -> str:
    """Three digits behind the point, fewer of what is large."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def interval(of: Estimate) -> str:
    return f"{number(of.value)} [{number(of.low)}, {number(of.high)}]"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of one width each."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)


def _models(summaries: Sequence[Summary]) -> str:
    names = list(dict.fromkeys(name for each in summaries for name in each.estimates))
    rows = [["", *(each.name for each in summaries), "prompts"]]
    for name in names:
        found = [each.estimates.get(name) for each in summaries]
        counts = sorted({of.n for of in found if of is not None})
        cells = ["" if of is None else interval(of) for of in found]
        rows.append([_label(name), *cells, "-".join(map(str, counts))])
    for kind in dict.fromkeys(kind for each in summaries for kind in each.calibration):
        cells = [number(each.calibration[kind].ece) if kind in each.calibration else "" for each in summaries]
        rows.append([f"ECE of the {kind}", *cells, ""])
    return aligned(rows)


def _differences(comparisons: Sequence[Comparison]) -> str:
    names = list(dict.fromkeys(name for each in comparisons for name in each.differences))
    rows = [["", *(f"{each.second} - {each.first}" for each in comparisons)]]
    rows += [[_label(name), *(_difference(each.differences.get(name)) for each in comparisons)] for name in names]
    corrected = " (Holm's, over the pairs of models)" if len(comparisons) > 1 else ""
    return f"{aligned(rows)}\n* p < {SIGNIFICANT:g}{corrected}"


def _difference(of: Difference | None) -> str:
    if of is None:
        return ""
    return f"{interval(of.estimate)} p={of.p_holm:.2g}{'*' if of.p_holm < SIGNIFICANT else ''}"


def _winner(of: Comparison) -> str:
    won = of.win_rate
    if won is None:
        return ""
    return (
        f"{of.second} wins against {of.first}: {interval(won.plain)}; at equal length "
        f"{interval(won.length_controlled)} (its answers are {won.longer_by:+.1f} tokens longer)"
    )


def _of_reward(name: str, found: PairAccuracy) -> str:
    kinds = found.by_length | found.by_format
    rows = [[f"{name}, pairs", "accuracy", "pairs"], ["all", interval(found.accuracy), str(found.accuracy.n)]]
    rows += [[f"  {kind}", interval(of), str(of.n)] for kind, of in kinds.items()]
    return aligned([*rows, ["the longer one, always", number(found.longer), str(found.accuracy.n)]])


def _label(name: str) -> str:
    return f"{name} ({UNITS[name]})" if name in UNITS else name
