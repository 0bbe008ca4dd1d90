"""The measured tables, from results files: `python benchmarks/tables.py benchmarks/results/*.jsonl`.

Between `<!-- table:head -->` and `<!-- /table -->` of the README, and for `families` in docs/measured.md, comes one
table a file of that program, of the newest run in it, so that no number there is typed by hand. A program of which
no file is given keeps its tables; one that has none, `sweep` or `rows`, has its run shown here instead.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from growth import growths
from measurement import Measurement, last_run
from report import show, show_growth

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
COUNTED = (
    " Counted: the least that the flop and bytes of its schedule take at this run's rates of a product and of a copy, "
    "and the flop a byte from memory."
)
OVER_FLOOR = "Time over the floor, which is as many plain products as the head of the {} says, and peak memory"


def by_contestant(measurements: Sequence[Measurement]) -> list[str]:
    """The legend, and the lines."""
    at, cases = {(m.provider, m.case): m for m in measurements}, _cases(measurements)
    lines = [f"| | {' | '.join(cases.values())} | worst logp error |", "|---" * (len(cases) + 2) + "|"]
    for provider in _present(measurements):
        cells = [_cell(at.get((provider, case))) for case in cases]
        logp = [m.errors["logp"] for m in measurements if m.provider == provider and "logp" in m.errors]
        lines.append(f"| {' | '.join([_bold(provider), *cells])} | {f'{max(logp):.0e}' if logp else ''} |")
    counted = dict.fromkeys(m.provider for m in measurements if m.bound_seconds)
    for provider in counted:
        cells = [_bound(at.get((provider, case))) for case in cases]
        lines.append(f"| {' | '.join([f'{provider}, counted', *cells])} | |")
    return [OVER_FLOOR.format("column") + f".{COUNTED if counted else ''}", *lines]


def _bound(m: Measurement | None) -> str:
    if m is None or m.bound_over_floor is None:
        return ""
    return f"{m.bound_over_floor:.2f}, {m.intensity:.0f} flop/B"


def by_case(measurements: Sequence[Measurement]) -> list[str]:
    """The legend, and the lines."""
    at, present = {(m.provider, m.case): m for m in measurements}, _present(measurements)
    lines = [f"| | {' | '.join(map(_bold, present))} |", "|---" * (len(present) + 1) + "|"]
    for case, title in _cases(measurements).items():
        cells = [_cell(at.get((provider, case)), "dhidden") for provider in present]
        lines.append(f"| {' | '.join([title, *cells])} |")
    return [OVER_FLOOR.format("row") + "; relative error of the gradient of the hidden states.", *lines]


def _cases(measurements: Sequence[Measurement]) -> dict[str, str]:
    return {m.case: f"{m.case} ({m.products} G)" for m in measurements}


def _present(measurements: Sequence[Measurement]) -> list[str]:
    return list(dict.fromkeys(m.provider for m in measurements if m.status != "absent"))


def _bold(provider: str) -> str:
    return f"**{provider}**" if provider.startswith("fastpost") else provider


def _cell(m: Measurement | None, error: str | None = None) -> str:
    if m is None or m.status == "absent":
        return ""
    if m.over_floor is None:
        return m.status
    memory = "" if m.peak_bytes is None else f", {m.peak_bytes / 1e6:.0f} MB"
    return f"{m.over_floor:.2f}{memory}" + (f", {m.errors[error]:.0e}" if error else "")


# Of the head, a row a contestant and a column a case; of the families, which are many, a row a case.
TABLES: dict[str, Callable[[Sequence[Measurement]], list[str]]] = {"head": by_contestant, "families": by_case}
PAGES = {"head": README, "families": ROOT / "docs" / "measured.md"}


def markdown(measurements: Sequence[Measurement]) -> str:
    setup = measurements[0].setup
    versions = ", ".join(f"{package} {version}" for package, version in setup.machine.versions.items())
    legend, *lines = TABLES[setup.bench](measurements)
    return "\n".join([f"{setup.title}; {versions}. {legend}", "", *lines]) + "\n"


def show_instead(file: Path, measurements: Sequence[Measurement]) -> None:
    """A run that has no place on a page, as its own program shows it."""
    bench = measurements[0].setup.bench
    print(f"{file}: no page has a table of {bench!r}, so none was changed; this is the run")
    if bench == "sweep":
        show_growth(growths(measurements))
    else:
        show(measurements)


def rewritten(text: str, bench: str, tables: Sequence[str]) -> str:
    marked = re.compile(rf"(<!-- table:{bench} -->\n).*?(<!-- /table -->)", re.DOTALL)
    if len(marked.findall(text)) != 1:
        raise ValueError(f"the page must have `<!-- table:{bench} -->` and, on a later line, `<!-- /table -->`, once")
    body = "\n".join(tables)
    return marked.sub(lambda marks: f"{marks[1]}{body}{marks[2]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the measured tables from results files.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--page", type=Path, help="one page for all of them, not each table's own")
    options = parser.parse_args(argv)
    try:
        runs = {file: last_run(file) for file in options.files}
        for bench in sorted(TABLES.keys() & {run[0].setup.bench for run in runs.values()}):
            page = options.page or PAGES[bench]
            tables = [markdown(run) for run in runs.values() if run[0].setup.bench == bench]
            page.write_text(rewritten(page.read_text(), bench, tables))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for file, run in runs.items():
        if run[0].setup.bench not in TABLES:
            show_instead(file, run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
