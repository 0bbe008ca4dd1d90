"""A report as one picture, a panel a question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from typing import Any

from fastpost.evaluation.intervals import Estimate
from fastpost.evaluation.pairs import PairAccuracy
from fastpost.evaluation.summary import Summary

BARS = ("accuracy", "sampled/accuracy", "refusal", "over_refusal")

Draw = Callable[[Any], None]  # on axes


def _bars(of: Mapping[str, Mapping[str, Estimate]], names: Sequence[str], axes: Any) -> None:
    width = 0.8 / len(of)
    for i, (label, estimates) in enumerate(of.items()):
        at = [(place + i * width, estimates[name]) for place, name in enumerate(names) if name in estimates]
        places, found = [place for place, _ in at], [each for _, each in at]
        error = [[e.value - e.low for e in found], [e.high - e.value for e in found]]
        axes.bar(places, [e.value for e in found], width, yerr=error, capsize=2, label=label)
    axes.set_xticks([place + (len(of) - 1) * width / 2 for place in range(len(names))], names)
    axes.tick_params(axis="x", rotation=30 if len(names) > 3 else 0, labelsize=8)
    axes.set_ylim(0, 1.02)


def _curves(summaries: Sequence[Summary], name: str, ks: Sequence[int], axes: Any) -> None:
    for each in summaries:
        found = [(k, each.estimates[f"{name}@{k}"]) for k in ks if f"{name}@{k}" in each.estimates]
        at = [k for k, _ in found]
        axes.plot(at, [e.value for _, e in found], marker=".", label=each.name)
        axes.fill_between(at, [e.low for _, e in found], [e.high for _, e in found], alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_xlabel("k, samples a prompt")
    axes.set_ylim(0, 1.02)


def _reliability(summaries: Sequence[Summary], kind: str, axes: Any) -> None:
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    for each in summaries:
        if kind in each.calibration:
            of = each.calibration[kind]
            held = [b for b in of.bins if b.accuracy is not None]
            label = f"{each.name}, ECE {of.ece:.3f}"
            axes.plot([b.confidence for b in held], [b.accuracy for b in held], marker="o", label=label)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.02, 1.02)


def panels_of(summaries: Sequence[Summary], pairs: Mapping[str, PairAccuracy], ks: Sequence[int]) -> dict[str, Draw]:
    """By their titles, those for which there are numbers."""
    found: dict[str, Draw] = {}
    shares = [name for name in BARS if any(name in each.estimates for each in summaries)]
    if shares:
        found["shares of prompts"] = partial(_bars, {s.name: s.estimates for s in summaries}, shares)
    for name in ("pass", "maj"):
        if any(f"{name}@{ks[0]}" in each.estimates for each in summaries if ks):
            found[f"{name}@k"] = partial(_curves, summaries, name, ks)
    for kind in dict.fromkeys(kind for each in summaries for kind in each.calibration):
        found[f"reliability of the {kind}"] = partial(_reliability, summaries, kind)
    if pairs:
        of = {name: {"all": p.accuracy} | p.by_length | p.by_format for name, p in pairs.items()}
        found["pairs that are judged right"] = partial(
            _bars, of, list(dict.fromkeys(k for p in of.values() for k in p))
        )
    return found


def drawn(panels: Mapping[str, Draw]) -> bytes:
    """A PNG of one panel or more."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * height), layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state, whatever the machine's display
    for place, (title, onto) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(height, columns, place, title=title)
        onto(axes)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    picture = BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()
