"""Which columns a verb takes, in TRL's formats, and loud checks that every row has them.

A prompt, completion, chosen or rejected is a string or a list of {"role": ..., "content": ...}, of one kind in a file.
What a verb does not read goes to the reward functions, or nowhere.
"""

from __future__ import annotations

import math
from os import PathLike
from typing import Any, Literal

from fastpost.files import Row, Rows
from fastpost.types import nearest

Verb = Literal[
    "sft", "reward", "prm", "dpo", "orpo", "simpo", "cpo", "kto",
    "online-dpo", "grpo", "rloo", "reinforce", "ppo", "distill",
]  # fmt: skip
Columns = tuple[str, ...]

IMITATED: tuple[Columns, ...] = (("prompt", "completion"), ("messages",), ("text",))
PAIRS: tuple[Columns, ...] = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
PROMPTS: tuple[Columns, ...] = (("prompt",),)
STEPS: tuple[Columns, ...] = (("prompt", "completions", "labels"),)

# Any one of these sets of columns will do; the first that is there is taken.
FORMATS: dict[Verb, tuple[Columns, ...]] = {
    "sft": IMITATED,
    "reward": PAIRS,
    "prm": STEPS,
    "dpo": PAIRS,
    "orpo": PAIRS,
    "simpo": PAIRS,
    "cpo": PAIRS,
    "kto": (("prompt", "completion", "label"), *PAIRS),
    "online-dpo": PROMPTS,
    "grpo": PROMPTS,
    "rloo": PROMPTS,
    "reinforce": PROMPTS,
    "ppo": PROMPTS,
    "distill": (*IMITATED, *PROMPTS),
}
KINDS = {"text": ("text",), "messages": ("messages",)}  # of the others: either


def row_at(path: str | PathLike[str], i: int) -> str:
    """A row, in a message."""
    return f"{path}, row {i}" if path else f"row {i}"


def format_of(rows: Rows, verb: Verb) -> Columns | None:
    """The columns that the verb reads of these rows."""
    present = columns_of(rows)
    return next((names for names in FORMATS[verb] if all(name in present for name in names)), None)


def columns_of(rows: Rows) -> list[str]:
    return list(rows.column_names) if hasattr(rows, "column_names") else list(rows[0])


def check_columns(rows: Rows, verb: Verb, path: str | PathLike[str]) -> None:
    """ValueError unless every row has one of the formats that the verb takes, the same in all of them."""
    present = columns_of(rows)
    if "images" in present or "image" in present:
        raise ValueError(f"{path}: images are not supported yet; drop the column to train on the text alone")
    wanted = format_of(rows, verb)
    if wanted is None:
        raise ValueError(f"{path}: {_missing(present, verb)}")
    pairs, found = wanted in PAIRS, None
    if pairs and isinstance(rows[0].get("prompt"), str) and isinstance(rows[0]["chosen"], list):
        wanted = ("chosen", "rejected")  # each a conversation from its start; the prompt is a copy
    for i, row in enumerate(rows):
        for name in wanted:
            where = f"{row_at(path, i)}, column {name!r}"
            if name == "label":
                _check_label(row.get(name), where)
                continue
            if name in ("completions", "labels"):
                _check_steps(row, name, where)
                continue
            kind = _kind(row.get(name), where, KINDS.get(name, ("text", "messages")))
            if kind != (found := found or kind):
                raise ValueError(f"{where} is {kind}, where the rows before have {found}")
        if pairs and "margin" in present:
            _check_margin(row.get("margin"), f"{row_at(path, i)}, column 'margin'")
        if found == "messages":
            _check_template_columns(row, row_at(path, i))


def _missing(present: list[str], verb: Verb) -> str:
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
        _check_text(value, where)
        return "text"
    if not isinstance(value, list) or not value or "messages" not in allowed:
        expected = " or ".join({"text": "text", "messages": "a list of messages"}[kind] for kind in allowed)
        raise ValueError(f"{where} must be {expected}, got {_shown(value)}")
    for message in value:
        _check_message(message, where)
    return "messages"


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or "role" not in message or not {"content", "tool_calls"} & message.keys():
        raise ValueError(f'{where}: a message must be {{"role": ..., "content": ...}}, got {repr(message)[:80]}')
    if not isinstance(message["role"], str):
        raise ValueError(f"{where}: the role of a message must be text, got {_shown(message['role'])}")
    content = message.get("content")
    if isinstance(content, str):
        _check_text(content, where)
    elif isinstance(content, list):
        if any(isinstance(part, dict) and str(part.get("type")).startswith("image") for part in content):
            raise ValueError(f"{where}: images are not supported yet, and a message has one in its content")
    elif content is not None or not message.get("tool_calls"):
        raise ValueError(f"{where}: the content of a message must be text, got {_shown(content)}")


def _check_text(text: str, where: str) -> None:
    """Half of a surrogate pair can be written in JSON, and no tokenizer takes it."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"{text[error.start]!a} at character {error.start}"
            raise ValueError(f"{where} is not valid Unicode: {half} is half of a pair") from None


def _check_label(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, got {_shown(value)}")


def _check_steps(row: Row, name: str, where: str) -> None:
    """Of a solution: texts, and as many labels, true or false or a probability."""
    values, steps = row.get(name), row.get("completions")
    if not isinstance(values, list) or not values or len(values) != len(steps or ()):
        what = "the steps, one text or more" if name == "completions" else f"one for each of {len(steps or ())} steps"
        raise ValueError(f"{where} must be a list, {what}, got {_shown(values)}")
    for i, value in enumerate(values):
        if name == "completions" and not isinstance(value, str):
            raise ValueError(f"{where}[{i}] must be text, got {_shown(value)}")
        if name == "labels" and not (isinstance(value, bool | int | float) and 0 <= value <= 1):
            raise ValueError(f"{where}[{i}] must be true, false or a probability, got {_shown(value)}")
        if isinstance(value, str):
            _check_text(value, f"{where}[{i}]")


def _check_margin(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {_shown(value)}")


def _check_template_columns(row: Row, where: str) -> None:
    """What goes to the chat template beside the messages."""
    if not isinstance(row.get("tools"), list | str | None):
        raise ValueError(f"{where}, column 'tools' must be a list or its JSON, got {_shown(row['tools'])}")
    if not isinstance(row.get("chat_template_kwargs"), dict | None):
        wrong = _shown(row["chat_template_kwargs"])
        raise ValueError(f"{where}, column 'chat_template_kwargs' must be an object, got {wrong}")


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]
