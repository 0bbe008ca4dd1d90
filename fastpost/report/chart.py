"""Charts as SVG: curves over steps, and one metric against another. Colours are those of page.css."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fastpost.report.html import Html, tag, together
from fastpost.report.scale import Axis, axis, labels, ticks
from fastpost.watching.curves import Points, smoothed
from fastpost.watching.text import number

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 8, 24  # what is not plot
DIGIT = 6.2  # width of a character
DRAWN = 400  # points of a curve, more than there are pixels
OUTLIERS = 0.02  # share of the raw points, at each end, that may leave the frame
FEW = 12  # points that are shown as dots, too


@dataclass(frozen=True)
class Series:
    label: str
    points: Points
    colour: int  # of page.css
    low: Points | None = None  # a band around it
    high: Points | None = None


def line_chart(series: Sequence[Series], limit: float | None = None) -> Html:
    """Curves over optimizer steps, smoothed, with the raw ones behind; `limit` is a dashed line."""
    raw = [thinned(one.points) for one in series]
    smooth = [smoothed(points) for points in raw]
    x = axis([step for points in raw for step, _ in points], LEFT, WIDTH - RIGHT, tight=True)
    y = axis(_values_in_view(series, raw, smooth, limit), HEIGHT - BOTTOM, TOP)
    shapes = [_band(one, x, y) for one in series]
    for one, behind, before in zip(series, raw, smooth, strict=True):
        colour = f"c{one.colour}"
        if behind != before:
            shapes.append(tag("path", d=_path(behind, x, y), cls_=f"raw {colour}"))
        shapes.append(tag("path", d=_path(before, x, y), cls_=f"line {colour}"))
        if len(before) <= FEW:
            shapes += [tag("circle", cx=x(a), cy=y(b), r=2.5, cls_=f"dot {colour}") for a, b in before]
    if limit is not None:
        shapes.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(limit), y2=y(limit), cls_="limit"))
    cursor = tag("line", x1=0, x2=0, y1=TOP, y2=HEIGHT - BOTTOM, cls_="cursor")
    scale = json.dumps([x.low, x.high, x.start, x.end])
    return _frame(x, y, "step", *shapes, cursor, data_scale=scale, data_curves=_data(raw))


def scatter(points: Sequence[tuple[float, float, float]], x_label: str) -> Html:
    """(step, x, y), from faint to full as the run goes on, the last one ringed."""
    x = axis([a for _, a, _ in points], LEFT, WIDTH - RIGHT)
    y = axis([b for _, _, b in points], HEIGHT - BOTTOM, TOP)
    shown = points[:: -(-len(points) // DRAWN)]
    shapes = [
        tag(
            "circle",
            tag("title", f"step {step:g}: {number(a)}, {number(b)}"),
            cx=x(a),
            cy=y(b),
            r=3,
            cls_="dot c0",
            opacity=f"{0.15 + 0.85 * (i + 1) / len(shown):.2f}",
        )
        for i, (step, a, b) in enumerate(shown)
    ]
    _, last_x, last_y = points[-1]
    ring = tag("circle", cx=x(last_x), cy=y(last_y), r=6, cls_="ring")
    return _frame(x, y, x_label, *shapes, ring)


def thinned(points: Points) -> Points:
    """At most DRAWN of the points, each the mean of its neighbours."""
    size = -(-len(points) // DRAWN)
    parts = (points[i : i + size] for i in range(0, len(points), size)) if size > 1 else ([point] for point in points)
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _values_in_view(
    series: Sequence[Series], raw: Sequence[Points], smooth: Sequence[Points], limit: float | None
) -> list[float]:
    """The smooth curves, most of the raw ones, and a limit that is not far away."""
    values = [value for points in smooth for _, value in points]
    for points in raw:
        ordered = sorted(value for _, value in points)
        cut = int(OUTLIERS * len(ordered))
        values += ordered[cut : len(ordered) - cut]
    values += [value for one in series for points in (one.low, one.high) if points for _, value in points]
    return [*values, limit] if limit is not None and limit < 2 * max(values) else values


def _band(one: Series, x: Axis, y: Axis) -> Html:
    if one.low is None or one.high is None:
        return Html()
    there, back = _path(thinned(one.low), x, y), _path(thinned(one.high)[::-1], x, y)
    return tag("path", d=f"{there}L{back.removeprefix('M')}Z", cls_=f"band c{one.colour}")


def _path(points: Points, x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)


def _data(curves: Sequence[Points]) -> str:
    """For page.js: [[steps, values], ...]."""
    return json.dumps(
        [[[round(step) for step, _ in one], [float(f"{value:.4g}") for _, value in one]] for one in curves],
        separators=(",", ":"),
    )


def _frame(x: Axis, y: Axis, x_label: str, *shapes: Html, **data: str) -> Html:
    """Grid, ticks and the shapes, clipped to the plot."""
    at_x, at_y = ticks(x.low, x.high), ticks(y.low, y.high)
    parts = []
    for value, text in zip(at_y, labels(at_y), strict=True):
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value), cls_="grid"))
        parts.append(tag("text", text, x=LEFT - 6, y=y(value) + 3.5, text_anchor="end"))
    for value, text in zip(at_x, labels(at_x), strict=True):
        if x(value) + DIGIT / 2 * len(text) < WIDTH - RIGHT - DIGIT * (len(x_label) + 1):  # before the axis' name
            parts.append(tag("text", text, x=x(value), y=HEIGHT - 7, text_anchor="middle"))
    parts.append(tag("text", x_label, x=WIDTH - RIGHT, y=HEIGHT - 7, text_anchor="end", cls_="name"))
    plot = tag("svg", *shapes, x=0, y=TOP - 4, width=WIDTH, height=HEIGHT - BOTTOM - TOP + 8, viewBox=_window())
    return tag("svg", together(*parts), plot, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", **data)


def _window() -> str:
    """The plot and a little room for dots; an inner svg clips what is outside of it, and needs no id to do so."""
    return f"0 {TOP - 4} {WIDTH} {HEIGHT - BOTTOM - TOP + 8}"
