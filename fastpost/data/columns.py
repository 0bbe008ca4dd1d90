"""Which columns a verb takes, in TRL's formats, and loud checks that every row has them.

A row is one of  prompt + completion | messages | text  (sft),  prompt + anything  (grpo). A prompt or completion is a
string or a list of {"role": ..., "content": ...}.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal

from fastpost.files import Rows
from fastpost.types import nearest

Verb = Literal["sft", "grpo"]

# Any one of these sets of columns will do; the first that is there is taken.
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": (("prompt", "completion"), ("messages",), ("text",)),
    "grpo": (("prompt",),),
}


def check_columns(rows: Rows, verb: Verb, path: str | PathLike[str]) -> None:
    """ValueError unless every row has one of the formats that the verb takes, the same in all of them."""
    present = list(rows.column_names) if hasattr(rows, "column_names") else list(rows[0])
    if "images" in present or "image" in present:
        raise ValueError(f"{path}: images are not supported yet; drop the column to train on the text alone")
    wanted = _format(present, verb)
    if wanted is None:
        raise ValueError(f"{path}: {_missing(present, verb)}")
    kinds = {"text": ("text",), "messages": ("messages",)}
    found: str | None = None
    for i, row in enumerate(rows):
        for name in wanted:
            where = f"{path}, row {i}, column {name!r}"
            kind = _kind(row.get(name), where, kinds.get(name, ("text", "messages")))
            if kind != (found := found or kind):
                raise ValueError(f"{where} is {kind}, where the rows before have {found}")


def _format(present: list[str], verb: str) -> tuple[str, ...] | None:
    return next((names for names in FORMATS[verb] if all(name in present for name in names)), None)


def _missing(present: list[str], verb: str) -> str:
    """Which columns the verb takes, which there are, and which of them was probably meant."""
    takes = ", or ".join(" and ".join(repr(name) for name in names) for names in FORMATS[verb])
    known = [name for names in FORMATS[verb] for name in names]
    meant = [f"{name!r}{hint}" for name in present if name not in known and (hint := nearest(name, known))]
    return f"{verb} takes the columns {takes}; this file has {', '.join(map(repr, present))}" + "".join(
        f"; {hint}" for hint in meant
    )


def _kind(value: Any, where: str, allowed: tuple[str, ...]) -> str:
    """ "text" or "messages"; ValueError for anything else, and for what is not allowed."""
    if isinstance(value, str) and "text" in allowed:
        return "text"
    if not isinstance(value, list) or not value or "messages" not in allowed:
        expected = " or ".join({"text": "text", "messages": "a list of messages"}[kind] for kind in allowed)
        raise ValueError(f"{where} must be {expected}, got {'nothing' if value is None else repr(value)[:60]}")
    for message in value:
        if not isinstance(message, dict) or "role" not in message or not {"content", "tool_calls"} & message.keys():
            raise ValueError(f'{where}: a message must be {{"role": ..., "content": ...}}, got {repr(message)[:80]}')
    return "messages"
