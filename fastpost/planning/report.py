"""Surveys as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastpost.planning.changes import Change
from fastpost.planning.config import Planned
from fastpost.planning.fit import largest_context, largest_rows, method_of
from fastpost.planning.plans import PARTS, Survey

GB = 1e9


def as_json(
    config: Planned,
    surveys: Mapping[str, Survey],
    refused: Mapping[str, str],  # why a method has no survey
    gpus: Sequence[int],
    advice: Sequence[Change],
) -> dict[str, Any]:
    """Everything in bytes, tokens, and sequences."""
    one = next(iter(surveys.values()))
    return {
        "model": config.model,
        "parameters": one.acted.made.parameters(),
        "rows": one.demand.rows,
        "length": one.demand.length,
        "completions": one.demand.completions,
        "method": method_of(config),
        "methods": {name: _method(survey, gpus) for name, survey in surveys.items()},
        "refused": dict(refused),
        "changes": [{"flags": change.flags, "saves_bytes": change.saves} for change in advice],
    }


def _method(survey: Survey, gpus: Sequence[int]) -> dict[str, Any]:
    demand, moments, peak = survey.demand, survey.moments, survey.peak
    by_engine = demand.rollout is not None and demand.rollout.engine
    return {
        "tokens": demand.tokens,
        "peak_bytes": peak.total,
        "peak_moment": peak.name,
        "peak_parts": dict(peak.parts),
        "parts": _most(moment.parts for moment in moments),
        "moments": [{"moment": m.name, "bytes": m.total, "parts": dict(m.parts)} for m in moments],
        "engine_cache_bytes": survey.acted.cached(demand.completions, demand.length) if by_engine else 0,
        "fits": {str(gpu): peak.total <= gpu * GB for gpu in gpus},
        "largest_microbatch_rows": {str(gpu): largest_rows(survey, round(gpu * GB)) for gpu in gpus},
        "largest_context_tokens": {str(gpu): largest_context(survey, round(gpu * GB)) for gpu in gpus},
    }


def _most(moments: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Of each part, in whichever moment."""
    found: dict[str, int] = {}
    for parts in moments:
        found |= {name: max(size, found.get(name, 0)) for name, size in parts.items()}
    return {name: found[name] for name in PARTS if name in found}


def table(found: Mapping[str, Any]) -> str:
    """What `as_json` says, for a terminal."""
    methods: Mapping[str, Any] = found["methods"]
    names = [name + (" *" if name == found["method"] else "") for name in methods]
    rows, length = found["rows"], found["length"]
    lines = [
        f"{found['model']}: {found['parameters'] / 1e9:.2f}B parameters; a microbatch of {rows} x {length} = "
        f"{rows * length} tokens"
        + (f", {found['completions']} completions at a time" if found["completions"] else "")
        + ". * is this run",
        "",
        *_aligned([["GB of each part, at its most", *names], *_parts(methods)]),
        "",
        *_aligned([["GB in all, while", *names], *_moments(methods)]),
        "",
        *_aligned([["largest microbatch; context", *names], *_largest(methods, length)]),
        *_remarks(found),
    ]
    return "\n".join(lines)


def _parts(methods: Mapping[str, Any]) -> list[list[str]]:
    parts = [part for part in PARTS if any(part in method["parts"] for method in methods.values())]
    return [[part, *(_gb(method["parts"].get(part)) for method in methods.values())] for part in parts]


def _moments(methods: Mapping[str, Any]) -> list[list[str]]:
    each = [{moment["moment"]: moment["bytes"] for moment in method["moments"]} for method in methods.values()]
    rows = [[name, *(_gb(sizes[name]) for sizes in each)] for name in each[0]]
    rows.append(["peak", *(_gb(method["peak_bytes"]) for method in methods.values())])
    return [*rows, ["which is in", *(method["peak_moment"] for method in methods.values())]]


def _gb(size: int | None) -> str:
    return "" if size is None else f"{size / GB:.2f}"


def _largest(methods: Mapping[str, Any], length: int) -> list[list[str]]:
    gpus = next(iter(methods.values()))["fits"]
    return [[f"in {gpu} GB", *(_fitting(method, gpu, length) for method in methods.values())] for gpu in gpus]


def _fitting(method: Mapping[str, Any], gpu: str, length: int) -> str:
    rows, context = method["largest_microbatch_rows"][gpu], method["largest_context_tokens"][gpu]
    if not context:
        return "nothing"
    return f"{f'{rows} x {length}' if rows else 'not one row'}; {context}"


def _remarks(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{name}: not planned: {why}" for name, why in found["refused"].items()]
    cache = max(method["engine_cache_bytes"] for method in found["methods"].values())
    if cache:
        lines.append(f"an engine's own KV cache is not counted: {_gb(cache)} GB for all completions at once")
    if found["changes"]:
        saved = [[f"  {change['flags']}", f"{_gb(change['saves_bytes'])} GB"] for change in found["changes"]]
        lines += ["this run does not fit; what each change by itself would save:", *_aligned(saved)]
    return ["", *lines] if lines else []


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
