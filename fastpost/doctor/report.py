"""What was found, for a terminal and as JSON: the verdict first, then what to look at, then everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any

from fastpost.data import Verb
from fastpost.doctor.checks import Overlap
from fastpost.doctor.columns import Column
from fastpost.doctor.lengths import SHARES, histogram, percentile, percentiles
from fastpost.doctor.masks import GREEN, RESET, clean, masked
from fastpost.doctor.readings import Reading

WIDTH = 100
BOLD, RED, YELLOW = "\033[1m", "\033[31m", "\033[33m"


@dataclass(frozen=True)
class Findings:
    """All that is known of a file."""

    path: str
    rows: int
    columns: Sequence[Column]
    foreign: Sequence[str]  # names that other formats use
    usable: Mapping[Verb, str | None]  # the reason against it
    oddities: Sequence[str]  # seen without a tokenizer
    overlap: Overlap | None
    readings: Sequence[Reading] | None  # None: there was no tokenizer
    max_length: int | None
    tokenizer: Any = None

    @property
    def sound(self) -> list[Verb]:
        """Verbs whose training would be sound, for all that was seen."""
        if self.readings is None:
            return [verb for verb, reason in self.usable.items() if reason is None]
        return [verb for reading in self.readings if reading.sound for verb in reading.verbs]


def as_json(found: Findings) -> dict[str, Any]:
    """Everything but the text of samples' colors."""
    return {
        "dataset": found.path,
        "rows": found.rows,
        "sound": found.sound,
        "unusable": {verb: reason for verb, reason in found.usable.items() if reason is not None},
        "columns": [asdict(column) for column in found.columns],
        "odd": [*found.foreign, *found.oddities],
        "overlap": None if found.overlap is None else asdict(found.overlap),
        "readings": [_reading_as_json(reading, found.tokenizer) for reading in found.readings or ()],
    }


def _reading_as_json(reading: Reading, tokenizer: Any) -> dict[str, Any]:
    lengths = reading.lengths
    return {
        "verbs": reading.verbs,
        "sound": reading.sound,
        "unsound": reading.problems.unsound,
        "odd": reading.problems.odd,
        "counts": None if reading.counts is None else asdict(reading.counts),
        "lengths": {str(share): percentile(lengths, share) for share in (*SHARES, 100)} if lengths else None,
        "samples": [
            {name: "".join(masked(example, tokenizer, False, WIDTH)) for name, example in unit.items()}
            for unit in reading.samples
        ],
    }


def text(found: Findings, color: bool) -> str:
    """What a terminal shows."""
    blocks = [_verdict(found, color), _columns(found), *_of_readings(found, color), _unusable(found)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _verdict(found: Findings, color: bool) -> list[str]:
    """A line, and under it what is wrong, then what to look at."""
    sound, asked = found.sound, list(found.usable)
    if sound:
        blind = ", as far as can be seen without a tokenizer (--model)" if found.readings is None else ""
        head = f"SOUND for {_listed(sound)}{blind}"
    else:
        head = f"UNSOUND for {_listed(asked)}" if len(asked) == 1 else "UNSOUND: no verb can train on this"
    lines = _wrapped(head, code=BOLD + (GREEN if sound else RED) if color else "")
    for line in _wrong(found):
        lines += _wrapped(line, _paint("x ", RED, color))
    for line in _odd(found):
        lines += _wrapped(line, _paint("! ", YELLOW, color))
    return lines


def _wrong(found: Findings) -> list[str]:
    """What makes training unsound, and for whom; of the one verb that is asked about, also why it cannot be at all."""
    verbs: dict[str, list[Verb]] = {}
    for reading in found.readings or ():
        for line in reading.problems.unsound:
            verbs.setdefault(line, []).extend(reading.verbs)
    if len(found.usable) == 1:
        verbs |= {reason: [verb] for verb, reason in found.usable.items() if reason is not None}
    return [f"{_listed(some)}: {line}" for line, some in verbs.items()]


def _odd(found: Findings) -> list[str]:
    """What to look at, and who reads it, where not all do."""
    verbs: dict[str, list[Verb]] = {}
    for reading in found.readings or ():
        for line in reading.problems.odd:
            verbs.setdefault(line, []).extend(reading.verbs)
    every = sum(len(reading.verbs) for reading in found.readings or ())
    counted = any(reading.counts for reading in found.readings or ())
    return [
        *(line if len(some) == every else f"{_listed(some)}: {line}" for line, some in verbs.items()),
        *(() if found.overlap is None else found.overlap.lines),
        *(() if counted else found.oddities),
        *found.foreign,
    ]


def _columns(found: Findings) -> list[str]:
    rows = [[clean(column.name), column.kind, _size(column), _gaps(column)] for column in found.columns]
    return [f"{clean(found.path)}: {_rows(found.rows)}", *_aligned(rows)]


def _size(column: Column) -> str:
    if column.longest is None:
        return ""
    unit = {"text": "characters", "messages": "messages"}.get(column.kind, "elements")
    return f"{unit}: {column.median} at the median, {column.longest} at most"


def _gaps(column: Column) -> str:
    gaps = {"missing": column.missing, "of another kind": column.others}
    return ", ".join(f"{count} {words}" for words, count in gaps.items() if count)


def _of_readings(found: Findings, color: bool) -> Iterator[list[str]]:
    for reading in found.readings or ():
        if reading.counts is None:
            continue
        lines = _wrapped(f"{_listed(reading.verbs)}: {reading.counts}")
        if reading.lengths:
            limit = None if reading.counts.unit == "prompts" else found.max_length
            lines += ["", f"  {percentiles(reading.lengths)}{_beyond(reading.lengths, limit)}"]
            lines += [f"  {line}" for line in histogram(reading.lengths)]
        if reading.samples:
            lines += ["", *_samples(reading, found.tokenizer, color)]
        yield lines


def _beyond(lengths: Sequence[int], limit: int | None) -> str:
    longer = 0 if limit is None else sum(length > limit for length in lengths)
    return f"; {longer} exceed max_length {limit}" if longer else ""


def _samples(reading: Reading, tokenizer: Any, color: bool) -> list[str]:
    """What is trained, and what is not, of a few examples."""
    trained = any(example.predicted for unit in reading.samples for example in unit.values())
    mark = "in green" if color else "in [brackets]"
    lines = [f"  samples; what is trained is {mark}" if trained else "  samples"]
    for unit in reading.samples:
        for name, example in unit.items():
            lead = f"    {f'{name}: ' if name else '- '}"
            shown = masked(example, tokenizer, color and trained, WIDTH - len(lead))
            lines += [f"{lead if not i else ' ' * len(lead)}{line}" for i, line in enumerate(shown)]
    return lines


def _unusable(found: Findings) -> list[str]:
    """Verbs that cannot use the file, by the reason."""
    if len(found.usable) == 1:
        return []
    by_reason: dict[str, list[Verb]] = {}
    for verb, reason in found.usable.items():
        if reason is not None:
            by_reason.setdefault(reason, []).append(verb)
    lines = [f"not for {_listed(verbs)}: {reason}" for reason, verbs in by_reason.items()]
    return [part for line in lines for part in _wrapped(line)]


# ---- laying out ----


def _listed(verbs: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(verbs[:-1]), *verbs[-1:]]))


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


def _paint(words: str, code: str, color: bool) -> str:
    return f"{code}{words}{RESET}" if color else words


def _wrapped(line: str, mark: str = "", code: str = "") -> list[str]:
    """The line in WIDTH columns, after its mark; further lines are indented under it."""
    first, *rest = wrap(clean(line), WIDTH - 4, break_on_hyphens=False)
    lead = f"  {mark}" if mark else ""
    return [lead + _paint(first, code, bool(code)), *(f"    {_paint(part, code, bool(code))}" for part in rest)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
