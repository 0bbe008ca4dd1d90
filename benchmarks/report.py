"""Measurements as a table for a terminal: by rich where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from growth import Growth
from measurement import Measurement

ERRORS = {"logp": "logp err", "loss": "loss err", "dhidden": "dX err", "dweight": "dW err"}
GROWTH = ("case", "provider", "along", "us each", "ms at 0", "R2", "worst", "first MB", "last MB", "counted MB")
COLUMNS = ("case", "provider", "ms", "x floor", "x bound", "x naive", "TFLOP/s", "flop/B", "peak MB", *ERRORS.values())


def show(measurements: Sequence[Measurement]) -> None:
    """One table, what each contestant is, and a line for each result that has no speed."""
    table(measurements[0].setup.title, COLUMNS, [row(m) for m in measurements if m.status != "absent"])
    for m in {m.provider: m for m in measurements}.values():
        about = f"absent, {m.reason}" if m.status == "absent" else f"{m.package} {m.version}; {m.settings}"
        print(f"{m.provider}: {about}")
    for m in measurements:
        if m.status not in ("ok", "absent"):
            print(f"{m.status}: {m.provider}, {m.case}: {m.reason}")


def show_growth(growths: Sequence[Growth]) -> None:
    """The straight lines through seconds; peak memory at both ends, and what is counted at the last."""
    table("growth", GROWTH, [growth_row(growth) for growth in growths])


def growth_row(growth: Growth) -> list[str]:
    line, first, last = growth.line, growth.measurements[0], growth.measurements[-1]
    sizes = f"{growth.axis} {growth.sizes[0]} to {growth.sizes[-1]}"
    straight = [f"{line.slope * 1e6:.3f}", f"{line.intercept * 1e3:.1f}", f"{line.r_squared:.4f}", f"{line.worst:.0%}"]
    memory = [_number(m.peak_bytes, ".0f", 1e-6) for m in (first, last)]
    counted = _number(last.counted.workspace if last.counted else None, ".0f", 1e-6)
    return [growth.case, growth.provider, sizes, *straight, *memory, counted]


def row(m: Measurement) -> list[str]:
    milliseconds = _number(m.seconds, ".1f", 1e3) if m.status == "ok" else m.status
    ratios = [_number(value, ".2f") for value in (m.over_floor, m.over_bound, m.over_naive, m.tflops)]
    ratios.append(_number(m.intensity, ".0f"))
    wrong = [_number(m.errors.get(name), ".0e") for name in ERRORS]
    return [m.case, m.provider, milliseconds, *ratios, _number(m.peak_bytes, ".0f", 1e-6), *wrong]


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        print(title)
        for line in (columns, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(title=title)
    for name in columns:
        table.add_column(name, no_wrap=True, justify="left" if name in columns[:2] else "right")
    for line, following in zip_longest(rows, rows[1:]):
        table.add_row(*line, end_section=following is None or following[0] != line[0])
    wide = Console(width=1000)  # a narrow terminal may wrap the lines; numbers are never cut
    Console(width=max(wide.measure(table).maximum, 80)).print(table)
