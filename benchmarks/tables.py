"""The README's measured tables, from results files: `python benchmarks/tables.py benchmarks/results/*.jsonl`.

Between `<!-- table:head -->` and `<!-- /table -->` comes one table a file, of the newest run in it, so that no number
there is typed by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from measurement import Measurement, last_run

README = Path(__file__).resolve().parent.parent / "README.md"
MARKED = re.compile(r"(<!-- table:head -->\n).*?(<!-- /table -->)", re.DOTALL)
LEGEND = "Time over the floor, which is as many plain products as the head of the column says, and peak memory."


def markdown(measurements: Sequence[Measurement]) -> str:
    """A row a contestant, a column a case."""
    setup = measurements[0].setup
    at = {(m.provider, m.case): m for m in measurements}
    cases = {m.case: f"{m.case} ({m.products} G)" for m in measurements}
    present = list(dict.fromkeys(m.provider for m in measurements if m.status != "absent"))
    versions = ", ".join(f"{package} {version}" for package, version in setup.machine.versions.items())
    lines = [
        f"{setup.title}; {versions}. {LEGEND}",
        "",
        f"| | {' | '.join(cases.values())} | worst logp error |",
        "|---" * (len(cases) + 2) + "|",
    ]
    for provider in present:
        name = f"**{provider}**" if provider.startswith("fastpost") else provider
        cells = [_cell(at.get((provider, case))) for case in cases]
        logp = [m.errors["logp"] for m in measurements if m.provider == provider and "logp" in m.errors]
        lines.append(f"| {' | '.join([name, *cells])} | {f'{max(logp):.0e}' if logp else ''} |")
    return "\n".join(lines) + "\n"


def _cell(m: Measurement | None) -> str:
    if m is None or m.status == "absent":
        return ""
    if m.over_floor is None:
        return m.status
    memory = "" if m.peak_bytes is None else f", {m.peak_bytes / 1e6:.0f} MB"
    return f"{m.over_floor:.2f}{memory}"


def rewritten(text: str, tables: Sequence[str]) -> str:
    if len(MARKED.findall(text)) != 1:
        raise ValueError("the README must have `<!-- table:head -->` and, on a later line, `<!-- /table -->`, once")
    body = "\n".join(tables)
    return MARKED.sub(lambda marks: f"{marks[1]}{body}{marks[2]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the measured tables of the README from results files.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(argv)
    try:
        text = rewritten(options.readme.read_text(), [markdown(last_run(file)) for file in options.files])
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    options.readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
