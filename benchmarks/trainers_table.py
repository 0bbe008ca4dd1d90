"""The table of whole runs in docs/learn.md: `python benchmarks/trainers_table.py benchmarks/results/trainers/*.jsonl`.

Of each setting, method, seed and contestant the newest run counts, from the last file; a row is the mean of its seeds,
and whether its score rose is asked of them together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from harness import Machine
from learn import rises
from learn_report import PAGE
from learn_task import HELD_OUT
from tables import rewritten
from trainers import SETTINGS, UNLEARNED, Line
from trainers_task import COLUMNS, HEAD_STEPS, HIDDEN, LAYERS, VOCAB
from trainers_trace import PARTS

ORDER = (*SETTINGS, *COLUMNS)
TITLES = {"sums": "sums", "head": "large vocabulary"}
HEADS = ("", "", "s a step", *PARTS, "update", "s a 1000 tokens generated", "peak, RSS", "score")


def read(file: Path) -> dict[tuple[str, str], dict[str, list[Line]]]:
    """(setting, method) -> contestant -> its runs by seed."""
    lines = [_line(json.loads(text)) for text in file.read_text(encoding="utf-8").splitlines()]
    newest = {(line.setting, line.method, line.provider, line.seed): line for line in lines}
    found: dict[tuple[str, str], dict[str, list[Line]]] = {}
    for line in newest.values():
        found.setdefault((line.setting, line.method), {}).setdefault(line.provider, []).append(line)
    return dict(sorted(found.items(), key=lambda item: [ORDER.index(each) for each in item[0]]))


def _line(found: dict[str, Any]) -> Line:
    return Line(**{**found, "machine": Machine(**found["machine"])})


def markdown(runs: dict[tuple[str, str], dict[str, list[Line]]]) -> str:
    rows = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for (setting, method), by_name in runs.items():
        for name, lines in by_name.items():
            title = f"{method}, {TITLES[setting]}"
            rows.append(f"| {' | '.join([title, f'**{name}**' if name == 'fastpost' else name, *_cells(lines)])} |")
    return "\n".join([about(runs), "", *rows]) + "\n"


def about(runs: dict[tuple[str, str], dict[str, list[Line]]]) -> str:
    lines = [line for by_name in runs.values() for each in by_name.values() for line in each]
    m, seeds = lines[0].machine, len({line.seed for line in lines})
    versions = ", ".join(f"{name} {m.versions[name]}" for name in ("fastpost", "trl", "torch") if name in m.versions)
    return (
        f"{m.name}, {m.threads} thread; {lines[0].run[:10]}; {versions}; {seeds} seed{'s' * (seeds > 1)}. Seconds are "
        "of the process, medians of the steps of a run; shares of a step are of the clock. The other core did "
        "other work. Peak of live tensors in two steps, and of the process, interpreter and libraries included. "
        f"Scores are shares of {HELD_OUT} held-out sums. Large vocabulary: a random Llama of D {HIDDEN}, {LAYERS} "
        f"layers, V {VOCAB}, {HEAD_STEPS} steps."
    )


def _cells(lines: Sequence[Line]) -> list[str]:
    if wrong := _wrong(lines):
        return [wrong, *[""] * (len(HEADS) - 3)]
    shares = [mean((line.parts or {}).get(part, 0.0) / line.seconds for line in lines) for part in (*PARTS, "update")]
    first, cpu = lines[0], mean(line.cpu_seconds for line in lines)
    generated = f"{mean(1000 * line.cpu_seconds / line.tokens for line in lines):.3f}" if first.tokens else ""
    peak, resident = (mean(getattr(line, name) for line in lines) / 1e6 for name in ("peak_bytes", "rss_bytes"))
    score = "" if first.after is None else f"{_share(lines, 'before')} → {_share(lines, 'after')}"
    cells = [f"{share:.0%}" if share else "" for share in shares]
    return [f"{cpu:.3f}", *cells, generated, f"{peak:.0f}, {resident:.0f} MB", score]


def _wrong(lines: Sequence[Line]) -> str | None:
    """Why a row has no speed."""
    if wrong := [line.status for line in lines if line.status not in ("ok", UNLEARNED)]:
        return wrong[0]
    if any(line.after is None for line in lines):
        return None
    before, after = (mean(getattr(line, name) for line in lines) for name in ("before", "after"))
    return None if rises(before, after, HELD_OUT * len(lines)) else UNLEARNED


def _share(lines: Sequence[Line], name: str) -> str:
    return f"{mean(getattr(line, name) for line in lines):.0%}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the table of whole runs beside TRL's.")
    parser.add_argument("files", nargs="+", type=Path, help="the last of them counts")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    text = rewritten(options.page.read_text(), "trainers", [markdown(read(sorted(options.files)[-1]))])
    options.page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
