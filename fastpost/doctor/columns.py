"""What a file is, and which verbs can use it: needs no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from statistics import median
from typing import Any

from fastpost.data import FORMATS, Verb, check_columns, format_of
from fastpost.data.chat import is_empty
from fastpost.data.columns import Columns, columns_of
from fastpost.files import Rows
from fastpost.types import nearest

# Column names of other formats -> what to make of them.
FOREIGN = {
    "conversations": 'is ShareGPT\'s: make it \'messages\', of {"role": ..., "content": ...}',
    "instruction": "is Alpaca's: make it 'prompt' (with 'input' behind it), and 'output' 'completion'",
    "question": "may be the 'prompt', and 'answer' a column for the reward function",
    "response": "may be the 'completion'",
}


@dataclass(frozen=True)
class Column:
    """A column of a file."""

    name: str
    kind: str  # what most of its values are
    others: int  # values of another kind
    missing: int
    median: int | None  # characters of a text, messages of a list
    longest: int | None


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, list) and value and all(isinstance(one, Mapping) and "role" in one for one in value):
        return "messages"
    kinds = ((bool, "true or false"), (str, "text"), (int | float, "number"), (list, "list"), (Mapping, "object"))
    return next((words for kind, words in kinds if isinstance(value, kind)), type(value).__name__)


def describe(rows: Rows) -> list[Column]:
    """Every column of the rows."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [_column(name, [row.get(name) for row in rows]) for name in names]


def _column(name: str, values: Sequence[Any]) -> Column:
    there = [value for value in values if value is not None]
    kinds = [kind_of(value) for value in there]
    kind = max(dict.fromkeys(kinds), key=kinds.count, default="nothing")
    sizes = [len(value) for value in there if isinstance(value, str | list)]
    return Column(
        name=name,
        kind=kind,
        others=len(kinds) - kinds.count(kind),
        missing=len(values) - len(there),
        median=round(median(sizes)) if sizes else None,
        longest=max(sizes, default=None),
    )


def lacking(present: Sequence[str], verb: Verb) -> str:
    """The columns that the verb wants besides, in the format of it that is nearest."""

    def absent(names: Columns) -> list[str]:
        return [name for name in names if name not in present]

    names = min(FORMATS[verb], key=lambda names: (len(absent(names)), -len(names)))
    known = {name for formats in FORMATS.values() for names in formats for name in names}
    free = [name for name in present if name not in known]
    return "no column " + " and ".join(f"{name!r}{nearest(name, free)}" for name in absent(names))


def usable(rows: Rows, path: str | PathLike[str]) -> dict[Verb, str | None]:
    """Verb -> None where it can use the rows, else the nearest reason why it cannot."""
    found: dict[Verb, str | None] = {}
    for verb in FORMATS:
        try:
            found[verb] = None
            check_columns(rows, verb, path)
        except ValueError as error:
            found[verb] = lacking(columns_of(rows), verb) if format_of(rows, verb) is None else str(error)
    return found


def foreign(rows: Rows) -> list[str]:
    """What columns of other formats should become."""
    return [f"{name!r} {words}" for name in columns_of(rows) if (words := FOREIGN.get(name))]


def key(value: Any) -> str:
    """Equal for equal values, of any type."""
    return json.dumps(value, sort_keys=True, default=str)


def oddities(rows: Rows) -> list[str]:
    """What can be said of the rows without a tokenizer."""
    found = {
        "that repeat an earlier one": len(rows) - len({key(row) for row in rows}),
        "with an empty answer": sum(_has_empty_answer(row) for row in rows),
        "whose chosen and rejected are the same": sum("chosen" in r and r["chosen"] == r.get("rejected") for r in rows),
    }
    return [f"{count} of {len(rows)} rows {words}" for words, count in found.items() if count]


def _has_empty_answer(row: Mapping[str, Any]) -> bool:
    answers = [row.get(name) for name in ("completion", "chosen", "rejected", "messages", "text")]
    return any(_is_answer(answer) and is_empty(answer) for answer in answers if answer is not None)


def _is_answer(value: Any) -> bool:
    return isinstance(value, str) or kind_of(value) == "messages"
