"""Formats: tags in their order, and JSON of a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpost.rewards.texts import after_thinking, text_of

THINK = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*", re.DOTALL)
FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


def think_format(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 where the completion is one <think>...</think> and then an answer; else 0."""
    return [float(THINK.fullmatch(text_of(completion)) is not None) for completion in completions]


@dataclass(frozen=True)
class TagFormat:
    """1 where the completion is <a>...</a> <b>...</b> ... of `tags` in their order, each tag once, with nothing but
    space between and around; else 0."""

    tags: str = "think,answer"

    def __post_init__(self) -> None:
        if not all(re.fullmatch(r"\w+", tag) for tag in self.tags.split(",")):
            raise ValueError(f"tags must be names with commas between, as 'think,answer', got {self.tags!r}")

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(self._holds(text_of(completion))) for completion in completions]

    def _holds(self, text: str) -> bool:
        names = self.tags.split(",")
        once = all(text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in names)
        whole = r"\s*".join(rf"<{tag}>.*</{tag}>" for tag in names)
        return once and re.fullmatch(rf"\s*{whole}\s*", text, re.DOTALL) is not None


@dataclass(frozen=True)
class JsonSchema:
    """1 where the completion is JSON and valid against the schema; else 0. With jsonschema.

    The schema is a file, or the column `schema` of each sample, an object or its JSON. Of a completion what follows
    </think> is read, and of that the last fenced block, where there is one. NaN and Infinity are not JSON. A schema
    that refers to another by its address is refused: nothing is fetched.
    """

    schema: str = ""

    def __post_init__(self) -> None:
        if self.schema:
            _validator(self._file())

    def __call__(self, completions: Sequence[Any], schema: Sequence[Any] | None = None, **_: Any) -> list[float | None]:
        schemas = [self._file()] * len(completions) if self.schema else schema
        if schemas is None:
            raise ValueError("needs a column 'schema', or json_schema(schema='file.json')")
        return [
            None if one is None else float(_valid(_validator(one), text_of(completion)))
            for completion, one in zip(completions, schemas, strict=True)
        ]

    def _file(self) -> str:
        path = Path(self.schema).expanduser()
        if not path.is_file():
            raise ValueError(f"schema {self.schema!r} is no file")
        return path.read_text(encoding="utf-8")


def _validator(schema: Any) -> Any:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        kind = validator_for(schema)
        kind.check_schema(schema)
    except (ValueError, SchemaError) as error:
        raise ValueError(f"the schema {str(schema)[:80]!r} is no JSON schema: {str(error).splitlines()[0]}") from None
    return kind(schema, registry=Registry())  # one that retrieves nothing


def _valid(validator: Any, text: str) -> bool:
    from referencing.exceptions import Unresolvable

    text = after_thinking(text)
    blocks = FENCED.findall(text)
    try:
        value = json.loads(blocks[-1] if blocks else text, parse_constant=_no_constant)
        return validator.is_valid(value)
    except Unresolvable as error:
        raise ValueError(f"the schema refers to what is not in it: {error}") from None
    except (ValueError, RecursionError):  # not JSON, or nested by the thousand
        return False


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
