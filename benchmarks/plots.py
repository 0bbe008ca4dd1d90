"""Pictures of a sweep: `python benchmarks/plots.py benchmarks/results/<device>-<date>-sweep.jsonl`.

One SVG for a frozen head and one for a trained: against T and against V, the seconds (dots) and the straight line
through them with its R^2, and the peak memory (dots) with the workspace that is counted (dashes). Everything in them
comes from the file. They are written beside it, or into --output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from growth import AXES, Growth, growths
from measurement import Setup, last_run
from report import show_growth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, NAIVE = "fastpost fused_loss", "naive torch"
LETTERS = {"tokens": "T", "vocab": "V"}
SIZE = (11.0, 7.5)  # inches
SVG = {"svg.fonttype": "none", "svg.hashsalt": "fastpost"}  # text as text, and the same bytes from the same file


def draw(found: Sequence[Growth], title: str, file: Path) -> None:
    """Rows are milliseconds and megabytes, columns the axes."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasSVG(figure)  # no window, no global state, whatever the machine's display
    figure.suptitle(title)
    panels = figure.subplots(2, len(AXES), squeeze=False)
    for (above, below), axis in zip(panels.T, AXES, strict=True):
        for growth in (growth for growth in found if growth.axis == axis):
            _milliseconds(above, growth)
            _megabytes(below, growth)
        for panel, label in ((above, "milliseconds"), (below, "peak MB above inputs and gradients")):
            panel.set(xlabel=LETTERS[axis], ylabel=label, xlim=(0, None), ylim=(0, None))
            panel.grid(alpha=0.3)
        above.legend(fontsize="x-small")
    file.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(SVG):
        figure.savefig(file, metadata={"Date": None})


def _color(growth: Growth) -> dict[str, str]:
    return {"color": "grey"} if growth.provider == NAIVE else {}


def _milliseconds(panel: Axes, growth: Growth) -> None:
    line, ends = growth.line, (0.0, growth.sizes[-1])
    label = f"{growth.case.partition(',')[0]}, {growth.provider}; R² {line.r_squared:.4f}"
    (drawn,) = panel.plot(ends, [1e3 * line.at(x) for x in ends], linewidth=1, label=label, **_color(growth))
    panel.plot(growth.sizes, [1e3 * y for y in growth.seconds], ".", color=drawn.get_color())


def _megabytes(panel: Axes, growth: Growth) -> None:
    peak = [float("nan") if m.peak_bytes is None else m.peak_bytes / 1e6 for m in growth.measurements]
    counted = [m.counted.workspace / 1e6 if m.counted else float("nan") for m in growth.measurements]
    (drawn,) = panel.plot(growth.sizes, peak, ".-", linewidth=1, **_color(growth))
    panel.plot(growth.sizes, counted, "--", linewidth=0.8, color=drawn.get_color())


def selected(found: Sequence[Growth], head: str) -> list[Growth]:
    """fastpost's, and plain torch's for the first of the cases."""
    of = [growth for growth in found if growth.case.endswith(head)]
    return [g for g in of if g.provider == OURS or (g.provider == NAIVE and g.case == of[0].case)]


def title(setup: Setup, head: str) -> str:
    versions = ", ".join(f"{name} {setup.machine.versions[name]}" for name in ("fastpost", "torch"))
    return f"{setup.title}; {versions}; head {head}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draws how time and memory grow, from a sweep's results file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, help="folder; that of the file")
    options = parser.parse_args(argv)
    try:
        measurements = last_run(options.file)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    found = growths(measurements)
    show_growth(found)
    for head in ("frozen", "trained"):
        if curves := selected(found, head):
            file = (options.output or options.file.parent) / f"{options.file.stem}-{head}.svg"
            draw(curves, title(measurements[0].setup, head), file)
            print(f"written to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
