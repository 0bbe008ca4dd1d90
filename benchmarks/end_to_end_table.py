"""The README's table of whole steps: `python benchmarks/end_to_end_table.py benchmarks/results/end_to_end/*.jsonl`.

Between `<!-- table:end_to_end -->` and `<!-- /table -->` comes a row for each method and dtype, of the newest run that
measured them, from the last file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from end_to_end import Line
from harness import Machine
from step import Shape
from tables import README, rewritten


def read(file: Path) -> list[Line]:
    """The newest of each contestant on each method, in each dtype."""
    lines = [_line(json.loads(text)) for text in file.read_text().splitlines()]
    return list({(line.shape.dtype, line.method, line.provider): line for line in lines}.values())


def _line(found: dict[str, Any]) -> Line:
    return Line(**(found | {"machine": Machine(**found["machine"]), "shape": Shape(**found["shape"])}))


def about(line: Line) -> str:
    """What a table's legend says of a run."""
    m, shape = line.machine, line.shape
    versions = ", ".join(f"{package} {version}" for package, version in m.versions.items())
    model = f"a Llama of D {shape.hidden}, {shape.layers} layers, V {shape.vocab}"
    drawn = f"medians {shape.prompt} and {shape.completion}, standard deviation of the logarithm {shape.spread}"
    rows = f"{shape.rows} rows, of prompts and completions of log-normal lengths ({drawn}, seed {shape.seed})"
    head = " TRL's head scores every position here, and on a GPU only those with a label." if m.device == "cpu" else ""
    return f"{m.name}, {m.threads} threads; {line.run[:10]}; {versions}. {model}; {rows}.{head}"


def markdown(lines: Sequence[Line]) -> str:
    at = {(line.shape.dtype, line.method, line.provider): line for line in lines}
    providers = list(dict.fromkeys(line.provider for line in lines))
    names = [f"**{name}**" if name.startswith("fastpost") else name for name in providers]
    rows = [f"| tokens a second, peak memory | {' | '.join(names)} |", "|---" * (len(providers) + 1) + "|"]
    for dtype, method, tokens in dict.fromkeys((line.shape.dtype, line.method, line.tokens) for line in lines):
        cells = [_cell(at.get((dtype, method, provider))) for provider in providers]
        rows.append(f"| {' | '.join([f'{method}, {tokens} tokens, {dtype}', *cells])} |")
    return "\n".join([about(lines[-1]), "", *rows]) + "\n"


def _cell(line: Line | None) -> str:
    if line is None:
        return ""
    speed, peak = line.tokens_per_second, line.peak_bytes
    return f"{speed:.0f}, {peak / 1e6:.0f} MB" if speed and peak else line.status


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the README's table of whole steps from a results file.")
    parser.add_argument("files", nargs="+", type=Path, help="the last of them counts")
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(argv)
    text = rewritten(options.readme.read_text(), "end_to_end", [markdown(read(sorted(options.files)[-1]))])
    options.readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
