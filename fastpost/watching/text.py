"""Numbers, times and samples as people read them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

BARS = "▁▂▃▄▅▆▇█"
ENOUGH = 50  # values for the mean of a stretch


def number(value: float) -> str:
    """Three digits: 0.693, 1,234, 2e-05."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def count(value: float) -> str:
    """950, 12.3k, 2.49M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def memory(mebibytes: float) -> str:
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"


def duration(seconds: float) -> str:
    """0:07, 12:30, 3:12:30."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve in at most `width` characters, each the mean of a stretch; the lowest is the lowest bar."""
    columns = min(width, len(values))
    cuts = [i * len(values) // columns for i in range(columns + 1)] if columns else []
    stretches = (values[a : b : max(1, (b - a) // ENOUGH)] for a, b in pairwise(cuts))
    means = [sum(stretch) / len(stretch) for stretch in stretches]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def said(message: Any) -> str:
    """A prompt or completion as text: of a conversation, what was said last."""
    if isinstance(message, list) and message and isinstance(message[-1], dict):
        return str(message[-1].get("content", ""))
    return str(message)


def printable(text: str) -> str:
    """Without what would steer a terminal: a model writes what it likes."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "�" for c in text)


def first_lines(text: str, most: int, width: int) -> str:
    """The beginning of a text, in so many lines of a width, with an ellipsis where it goes on."""
    rows: list[str] = []
    for row in text.strip().split("\n"):
        rows += textwrap.wrap(row, width, replace_whitespace=False) or [""]
        if len(rows) > most:
            return "\n".join(rows[:most])[: -1 if len(rows[most - 1]) == width else None] + "…"
    return "\n".join(rows)
