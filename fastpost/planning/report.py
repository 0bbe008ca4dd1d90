"""Surveys as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastpost.planning.config import Planned
from fastpost.planning.fit import Change, method_of
from fastpost.planning.plans import PARTS, Survey

GB = 1e9


def as_json(
    config: Planned, surveys: Mapping[str, Survey], gpus: Sequence[int], advice: Sequence[Change]
) -> dict[str, Any]:
    """Everything in bytes and tokens."""
    first = next(iter(surveys.values()))
    return {
        "model": config.model,
        "parameters": first.made.parameters(),
        "rows": first.demand.rows,
        "length": first.demand.length,
        "method": method_of(config),
        "methods": {name: _method(survey, gpus) for name, survey in surveys.items()},
        "changes": [{"flags": change.what, "saves_bytes": change.saves} for change in advice],
    }


def _method(survey: Survey, gpus: Sequence[int]) -> dict[str, Any]:
    tokens = survey.demand.tokens
    peak, positions = survey.peak(tokens), survey.made.positions
    largest = {gpu: survey.largest(round(gpu * GB)) for gpu in gpus}
    return {
        "tokens": tokens,
        "peak_bytes": peak.total,
        "peak_moment": peak.name,
        "parts": dict(peak.parts),
        "moments": [{"moment": m.name, "bytes": m.total, "parts": dict(m.parts)} for m in survey.moments(tokens)],
        "fits": {str(gpu): peak.total <= gpu * GB for gpu in gpus},
        "largest_microbatch_tokens": {str(gpu): most for gpu, most in largest.items()},
        "largest_context_tokens": {
            str(gpu): min(_context(survey, most), positions or most) for gpu, most in largest.items()
        },
    }


def _context(survey: Survey, most: int) -> int:
    """Tokens of the longest sequence, where what a loss must see together is one or a pair."""
    return most // 2 if survey.demand.unit > 1 else most


def table(found: Mapping[str, Any]) -> str:
    """What `as_json` says, for a terminal."""
    methods: Mapping[str, Any] = found["methods"]
    names = [name + (" *" if name == found["method"] else "") for name in methods]
    rows = [["GB at the peak", *names]]
    for part in PARTS:
        sizes = [method["parts"].get(part, 0) for method in methods.values()]
        if any(sizes):
            rows.append([part, *(f"{size / GB:.2f}" if size else "" for size in sizes)])
    rows.append(["together", *(f"{method['peak_bytes'] / GB:.2f}" for method in methods.values())])
    rows.append(["which is in", *(method["peak_moment"] for method in methods.values())])
    lines = [
        f"{found['model']}: {found['parameters'] / 1e9:.2f}B parameters; a microbatch of {found['rows']} x "
        f"{found['length']} = {found['rows'] * found['length']} tokens. * is this run",
        "",
        *_aligned(rows),
        "",
        *_aligned([["largest microbatch; context", *names], *_largest(methods)]),
    ]
    if found["changes"]:
        saved = [[f"  {change['flags']}", f"{change['saves_bytes'] / GB:.2f} GB"] for change in found["changes"]]
        lines += ["", "this run does not fit; what each change by itself would save:", *_aligned(saved)]
    return "\n".join(lines)


def _largest(methods: Mapping[str, Any]) -> list[list[str]]:
    gpus = next(iter(methods.values()))["fits"]
    return [[f"tokens in {gpu} GB", *(_most(method, gpu) for method in methods.values())] for gpu in gpus]


def _most(method: Mapping[str, Any], gpu: str) -> str:
    tokens, context = method["largest_microbatch_tokens"][gpu], method["largest_context_tokens"][gpu]
    return f"{tokens}; {context}" if tokens else "-"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
