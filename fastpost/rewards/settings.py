"""Settings of a built-in reward, written as a call of literals: `repetition_penalty_reward(ngram_size=4)`."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from typing import Any

from fastpost.types import nearest


def called(spec: str) -> tuple[str, dict[str, Any]] | None:
    """Name and settings of `name(setting=literal, ...)`; None: it is not written so."""
    try:
        call = ast.parse(spec.strip(), mode="eval").body
    except SyntaxError:
        return None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return None
    name, values = call.func.id, {keyword.arg: keyword.value for keyword in call.keywords}
    if call.args or not all(isinstance(value, ast.Constant | ast.UnaryOp) for value in values.values()):
        raise ValueError(f"reward {spec!r}: settings are numbers and texts given by name, as in {name}(setting=1)")
    return name, {str(setting): ast.literal_eval(value) for setting, value in values.items()}


def configured(spec: str, found: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    """A function as it is; a class, a frozen dataclass, with these of its fields."""
    fields = _fields(found)
    for setting, value in settings.items():
        if setting not in fields:
            has = f"it has {', '.join(fields)}" if fields else "it has none"
            raise ValueError(f"reward {spec!r}: no setting {setting!r}, {has}{nearest(setting, list(fields))}")
        kind = fields[setting].type
        if type(value).__name__ != kind and not (kind == "float" and type(value) is int):
            raise ValueError(f"reward {spec!r}: {setting} must be of type {kind}, got {value!r}")
    needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in settings]
    if needed:
        given = ", ".join(f"{setting}=..." for setting in needed)
        raise ValueError(f"reward {spec!r} needs settings: write '{spec.partition('(')[0]}({given})'")
    try:
        return found(**settings) if isinstance(found, type) else found
    except ValueError as error:
        raise ValueError(f"reward {spec!r}: {error}") from None


def _fields(found: Callable[..., Any]) -> dict[str, dataclasses.Field[Any]]:
    """Those that a user may set: what is not for show is not."""
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        return {}
    return {field.name: field for field in dataclasses.fields(found) if field.repr}
