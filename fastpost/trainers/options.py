"""Fields that know their help, unit and domain, and how to read themselves from what a user wrote.

One reader serves Python, YAML and flags: `learning_rate: 1e-5` is a string in YAML 1.1, and every flag is one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from typing import Any

REQUIRED: Any = dataclasses.MISSING
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def option(
    default: Any,
    group: str,
    text: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    needed: bool = False,
) -> Any:
    """A dataclass field of a group of the help; numbers must be above `above`, and from `least` to `most`.

    `needed`: by the command line; in Python the verb may be handed the thing itself.
    """
    domain = {"above": above, "least": least, "most": most}
    return dataclasses.field(
        default=default, metadata={"group": group, "help": text, "domain": domain, "needed": needed}
    )


def check_config(config: Any, kind: type) -> None:
    """ValueError for a config of another verb."""
    if not isinstance(config, kind):
        raise ValueError(f"config must be of {kind.__name__}, got {type(config).__name__}: each verb has its own")


def is_needed(field: dataclasses.Field) -> bool:
    """Whether a command line must give it."""
    return field.default is REQUIRED or field.metadata["needed"]


def read_fields(config: Any) -> None:
    """Replaces every field of a dataclass by what `read` makes of it, and checks its domain: for __post_init__."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = read(field.name, getattr(config, field.name), hints[field.name])
        for number in value if isinstance(value, tuple) else (value,):
            _check_domain(field.name, number, **field.metadata["domain"])
        object.__setattr__(config, field.name, value)


def read(name: str, value: Any, hint: Any) -> Any:
    """The value as its type wants it; ValueError naming the field, what it got, and what would be right."""
    hint, optional = bare(hint)
    if optional and (value is None or (isinstance(value, str) and value.lower() in ("", "none", "null"))):
        return None
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return _choice(name, value, inner)
    if origin is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(read(name, one, inner[0]) for one in values)
    result = _convert(value, hint)
    if result is None:
        raise ValueError(f"{name} must be {describe(hint)}{' or none' if optional else ''}, got {value!r}")
    return result


def _convert(value: Any, kind: type) -> Any:
    """value as bool, int, float or str; None where it is no such thing."""
    if kind is str:
        return os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if kind is bool:
        return WORDS.get(value.lower()) if isinstance(value, str) else value if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    if kind is int:
        return int(number) if number.is_integer() else None
    return number


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value in choices:
        return value
    close = difflib.get_close_matches(str(value), choices, n=1)
    guess = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{guess}")


def _check_domain(name: str, value: Any, above: float, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if not value > above:
        raise ValueError(f"{name} must be above {above:g}, got {value:g}")
    if value < least:
        raise ValueError(f"{name} must be at least {least:g}, got {value:g}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:g}, got {value:g}")


def bare(hint: Any) -> tuple[Any, bool]:
    """(X, True) of `X | None`, (X, False) of X."""
    if isinstance(hint, types.UnionType):
        rest = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return rest[0], len(rest) < len(typing.get_args(hint))
    return hint, False


def describe(hint: Any) -> str:
    """A type in words."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words[hint]


def placeholder(hint: Any) -> str:
    """A type as the help writes it behind a flag."""
    hint, _ = bare(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"{placeholder(typing.get_args(hint)[0])} ..."
    return {bool: "true|false", int: "N", float: "X", str: "TEXT"}[hint]
