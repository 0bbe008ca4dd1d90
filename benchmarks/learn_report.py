"""The table of docs/learn.md and its curves: `python benchmarks/learn_report.py benchmarks/results/learn/*.jsonl`.

Of each method and seed the newest run counts, from the last file. The curves are written beside it, as an SVG, a panel
a method and a line a seed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from harness import Machine
from learn import Line
from learn_methods import METHODS
from plots import SVG
from tables import rewritten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = Path(__file__).resolve().parent.parent / "docs" / "learn.md"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t by the number of seeds, two-sided
COLUMNS = 4  # of panels
HEADS = ("method", "begins from", "learns from", "steps", "before", "after", "of each seed", "seconds")


def read(file: Path) -> dict[str, list[Line]]:
    """The newest run of each method and seed, by method, in their order."""
    lines = [_line(json.loads(text)) for text in file.read_text(encoding="utf-8").splitlines()]
    newest = {(line.method, line.seed): line for line in lines}
    found = {name: [newest[key] for key in sorted(newest) if key[0] == name] for name in METHODS}
    return {name: of for name, of in found.items() if of}


def _line(found: dict[str, Any]) -> Line:
    curve = [(step, score) for step, score in found["curve"]]
    return Line(**(found | {"machine": Machine(**found["machine"]), "curve": curve}))


# ---- the table ----


def markdown(runs: dict[str, list[Line]]) -> str:
    head = [
        "| method | begins from | learns from | steps | before | after | of each seed | seconds |",
        "|---" * 8 + "|",
    ]
    rows = [_row(name, lines) for name, lines in runs.items()]
    return "\n".join([about(runs), "", *head, *rows]) + "\n"


def about(runs: dict[str, list[Line]]) -> str:
    lines = [line for each in runs.values() for line in each]
    first, minutes, seeds = lines[0], sum(line.seconds for line in lines) / 60, len({line.seed for line in lines})
    m = first.machine
    versions = ", ".join(f"{name} {m.versions[name]}" for name in ("fastpost", "torch") if name in m.versions)
    return (
        f"{m.name}, {m.threads} thread; {first.run[:10]}; {versions}. Shares of {first.held_out} held-out problems, "
        f"means of {seeds} seeds. Seconds of a run's training: of its process, and of the clock of a machine that did "
        f"other work as well, {minutes:.0f} minutes in all.{compared(runs, 'ppo', 'grpo')}"
    )


def _row(name: str, lines: Sequence[Line]) -> str:
    each = ", ".join(f"{line.after:.0%}" for line in lines)
    before, after = mean(line.before for line in lines), mean(line.after for line in lines)
    seconds = f"{mean(line.cpu_seconds for line in lines):.0f}, {mean(line.seconds for line in lines):.0f}"
    first = lines[0]
    cells = [name, first.begins, first.dataset.replace("_", " "), str(first.steps), f"{before:.0%}", f"**{after:.0%}**"]
    return f"| {' | '.join([*cells, each, seconds])} |"


def compared(runs: dict[str, list[Line]], one: str, other: str) -> str:
    """What is to be said of two methods that began from the same models."""
    if one not in runs or other not in runs or len(runs[one]) != len(runs[other]) or len(runs[one]) not in T_95:
        return ""
    difference, within = apart(runs[one], runs[other])
    verdict = "the same within noise" if abs(difference) <= within else "not the same"
    points = f"{100 * difference:+.1f} points from {other}, ± {100 * within:.1f} (95 %, of paired seeds)"
    return f" {one} is {points}: {verdict}."


def apart(ones: Sequence[Line], others: Sequence[Line]) -> tuple[float, float]:
    """The mean difference of runs of the same seeds, and half its interval of 95 %."""
    differences = [a.after - b.after for a, b in zip(ones, others, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences))
    return mean(differences), T_95[len(differences)] * error


# ---- the curves ----


def draw(runs: dict[str, list[Line]], file: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = -(-len(runs) // COLUMNS)
    figure = Figure(figsize=(2.75 * COLUMNS, 2.2 * rows + 0.3), layout="constrained")
    FigureCanvasSVG(figure)  # no window, no global state, whatever the machine's display
    panels = list(figure.subplots(rows, COLUMNS, sharey=True, squeeze=False).flat)
    for panel, (name, lines) in zip(panels, runs.items(), strict=False):
        _panel(panel, name, lines)
    for panel in panels[len(runs) :]:
        panel.set_axis_off()
    figure.supxlabel("optimizer step", fontsize="small")
    figure.supylabel("held-out score", fontsize="small")
    with rc_context(SVG):
        figure.savefig(file, metadata={"Date": None})


def _panel(panel: Axes, name: str, lines: Sequence[Line]) -> None:
    for line in lines:
        panel.plot(*zip(*line.curve, strict=True), marker=".", linewidth=1.2)
    panel.set(ylim=(0, 1.02), xlim=(0, lines[0].steps))
    panel.set_title(name, fontsize="medium")
    panel.tick_params(labelsize="small")
    panel.grid(alpha=0.3)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the table and the curves of what the methods learned.")
    parser.add_argument("files", nargs="+", type=Path, help="the last of them counts")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    file = sorted(options.files)[-1]
    runs = read(file)
    options.page.write_text(rewritten(options.page.read_text(), "learn", [markdown(runs)]))
    draw(runs, file.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
