"""The parts of a page that are no charts: head, warnings, samples, where time goes, tables."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from fastpost.report.html import Html, tag, together
from fastpost.report.record import Record
from fastpost.watching.curves import is_number, trend
from fastpost.watching.text import count, duration, memory, number, said

# What a run is judged by: the first of these that it has, its name, and whether it should rise.
JUDGED_BY = (
    ("eval_reward", "the held-out reward", True),
    ("eval_accuracy", "the held-out accuracy", True),
    ("eval_rewards/accuracies", "the held-out accuracy", True),
    ("eval_loss", "the held-out loss", False),
    ("reward", "the reward", True),
    ("objective/scores", "the score", True),
    ("accuracy", "the accuracy", True),
    ("rewards/accuracies", "the accuracy", True),
    ("rewards/margins", "the margin", True),
    ("loss", "the loss", False),
)
LONGEST = 2000  # characters of a sample
PROBLEMS = {"unsound": "warning", "odd": "soft"}  # of data -> how they look


# ---- head ----


def head(run: Record) -> Html:
    model, data = (str(run.config.get(name, "")) for name in ("model", "dataset"))
    about = [
        text
        for text in (model, f"on {data}" if data else "", str(run.facts.get("started", "")).replace("T", " "))
        if text
    ]
    return tag(
        "header",
        tag("h1", f"{run.verb}: {run.directory.resolve().name}"),
        tag("p", " · ".join(about), cls_="soft"),
        tag("p", verdict(run), cls_="verdict"),
        tiles(run),
    )


def verdict(run: Record) -> str:
    """A sentence or two: how far it is, and what became of what it is judged by."""
    step, total = run.lines[-1]["step"], run.facts.get("total_steps")
    done = f"{step:,} of {total:,} steps" if is_number(total) and total != step else f"{step:,} steps"
    for metric, name, should_rise in JUDGED_BY:
        points = run(metric)
        if len(points) < 2:
            continue
        found = trend(points)
        first, last = (found.first, found.last) if found else (points[0][1], points[-1][1])
        if number(first) == number(last) or (found and abs(found.errors) < 3):
            return f"In {done} {name} stayed where it was, at {number(last)}."
        way = "rose" if last > first else "fell"
        doubt = "" if (last > first) == should_rise else ", the wrong way"
        return f"In {done} {name} {way} from {number(first)} to {number(last)}{doubt}."
    return f"{done.capitalize()}; nothing was measured twice."


def tiles(run: Record) -> Html:
    last, speeds = run.lines[-1], [value for _, value in run("tokens_per_second")]
    judged = next(((run(metric)[-1][1], name) for metric, name, _ in JUDGED_BY if run(metric)), (None, ""))
    shown = (
        (judged[1].removeprefix("the "), judged[0], number),
        ("steps", last["step"], "{:,}".format),
        ("epochs", last.get("epoch"), number),
        ("tokens", last.get("num_tokens"), count),
        ("tokens a second", fmean(speeds) if speeds else None, count),
        ("peak memory", last.get("peak_memory_mb"), memory),
        ("time", run.facts.get("seconds"), duration),
    )
    boxes = (
        tag("div", tag("b", show(value)), tag("span", name), cls_="tile")
        for name, value, show in shown
        if is_number(value)
    )
    return tag("div", *boxes, cls_="tiles")


def warned(run: Record) -> Html:
    if not run.warnings:
        return tag("p", "Nothing to warn of: none of the known failures shows in the curves.", cls_="fine")
    boxes = [
        tag(
            "div",
            tag("h3", warning.name, tag("span", f" since step {warning.step:,}", cls_="key")),
            tag("p", warning.seen),
            tag("p", warning.helps, cls_="soft"),
            cls_="warning",
        )
        for warning in run.warnings
    ]
    return together(*boxes)


# ---- samples ----


def samples(run: Record) -> Html | None:
    """The first, the middle and the last completions that were kept, of each step the best and the worst."""
    steps = sorted({line["step"] for line in run.completions if "step" in line})
    if not steps:
        return None
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    cards = [_card(step, [line for line in run.completions if line.get("step") == step]) for step in chosen]
    return tag("div", *cards, cls_="samples")


def _card(step: int, lines: list[dict[str, Any]]) -> Html:
    best = sorted((line for line in lines if is_number(line.get("reward"))), key=lambda line: -line["reward"])
    same = not best or best[0]["reward"] == best[-1]["reward"]
    shown = (best or lines)[:1] if same else [best[0], best[-1]]
    asked = tag("div", _cut(said(shown[0].get("prompt", ""))), cls_="said asked")
    return tag("div", tag("h3", f"step {step:,}"), asked, *map(_answer, shown), cls_="sample")


def _answer(line: dict[str, Any]) -> Html:
    reward = f"reward {number(line['reward'])}" if is_number(line.get("reward")) else "no reward"
    judged = tag("span", reward, cls_="reward") if "reward" in line else Html()  # a teacher gives none
    return tag("div", judged, tag("div", _cut(said(line.get("completion", ""))), cls_="said"), cls_="answer")


def _cut(text: str) -> str:
    return text.strip() if len(text) <= LONGEST else f"{text[:LONGEST].strip()}…"


# ---- time and tables ----


def where_time_goes(run: Record) -> Html | None:
    """The mean seconds of each part of a step, as shares of a bar."""
    names = sorted({name for line in run.lines for name in line if name.startswith("step_time/")})
    means = {name.split("/", 1)[1]: fmean(value for _, value in run(name)) for name in names if run(name)}
    whole = sum(means.values())
    if not whole:
        return None
    bar, keys = [], []
    for colour, (name, seconds) in enumerate(sorted(means.items(), key=lambda item: -item[1])):
        bar.append(tag("i", cls_=f"c{min(colour, 5)}", style=f"flex: {seconds / whole:.4f}"))
        text = f"{name} {seconds / whole:.0%}, {number(seconds)} s"
        keys.append(tag("span", tag("i", cls_=f"c{min(colour, 5)}"), text, cls_="key"))
    keys.append(tag("span", f"{number(whole)} s a step", cls_="key"))
    return together(tag("div", *bar, cls_="time"), tag("div", *keys, cls_="keys"))


def counts(run: Record) -> Html | None:
    """What became of the rows of each data set, and what was wrong with them."""
    tables = []
    for name, rows in run.table("data").items():
        given = rows if isinstance(rows, dict) else {"rows": rows}
        found = {key: value for key, value in given.items() if key not in PROBLEMS}
        body = [tag("tr", tag("td", key.replace("_", " ")), tag("td", _cell(value))) for key, value in found.items()]
        notes = [tag("p", line, cls_=cls) for key, cls in PROBLEMS.items() for line in given.get(key, ())]
        tables.append(tag("div", tag("table", tag("caption", name), *body), *notes))
    return tag("div", *tables, cls_="tables") if tables else None


def config(run: Record) -> Html | None:
    rows = [tag("div", tag("dt", key), tag("dd", _cell(value))) for key, value in run.config.items()]
    return tag("dl", *rows, cls_="config") if rows else None


def versions(run: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in run.table("versions").items())


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
