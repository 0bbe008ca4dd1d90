"""A run as one page of HTML, with its style and its script inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastpost.report import parts
from fastpost.report.html import Html, tag, together
from fastpost.report.panels import OTHERS, SPEED, sections
from fastpost.report.record import Record

HERE = Path(__file__).parent


def page(run: Record) -> str:
    title = f"{run.directory.resolve().name}: {run.verb}"
    style, script = (Html((HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    head = (
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", style),
    )
    body = tag("body", tag("main", *_parts(run)), tag("script", script))
    return f"<!doctype html>\n{tag('html', tag('head', *head), body, lang='en')}\n"


def _parts(run: Record) -> Iterator[Html]:
    yield parts.head(run)
    yield parts.warned(run)
    charts = dict(sections(run))
    others, speed = charts.pop(OTHERS, None), charts.pop(SPEED, None)
    for title, drawn in charts.items():
        yield _section(title, drawn)
    yield _section("Samples", parts.samples(run))
    yield _section("Where time goes", together(*filter(None, (parts.where_time_goes(run), speed))))
    yield _section("Data", parts.counts(run))
    yield _section("Config", parts.config(run))
    if others:
        yield tag("details", tag("summary", OTHERS), others)
    yield tag("footer", parts.versions(run))


def _section(title: str, content: Html | None) -> Html:
    return tag("section", tag("h2", title), content) if content else Html()
