"""Tools: Python functions with type hints and a docstring, which a model is told of and may call.

The schema of one is that of `transformers.utils.get_json_schema`, as in TRL's GRPOTrainer(tools=[...]).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpost.rewards.load import user_function
from fastpost.types import nearest

KINDS: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


@dataclass(frozen=True)
class Tool:
    """A function, by the file that it is in: calls of it are run in other processes."""

    name: str
    file: str
    schema: dict[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}

    def complaint(self, arguments: Mapping[str, Any]) -> str | None:
        """What is wrong with the arguments of a call, in words for the model."""
        parameters = self.schema["function"]["parameters"]
        known, needed = parameters.get("properties", {}), parameters.get("required", [])
        for name, value in arguments.items():
            if name not in known:
                return f"{self.name} has no argument {name!r}{nearest(name, list(known))}"
            if not _is(value, known[name]):
                return f"{self.name}: the argument {name!r} must be {known[name]['type']}, got {value!r:.80}"
        missing = [name for name in needed if name not in arguments]
        return f"{self.name} needs the argument {missing[0]!r}" if missing else None


def _is(value: Any, schema: Mapping[str, Any]) -> bool:
    kinds = schema.get("type")
    if kinds is None or (value is None and schema.get("nullable")):
        return True
    names = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(value, bool):
        return "boolean" in names
    return any(isinstance(value, KINDS.get(name, (object,))) for name in names)


def _tool(function: Callable[..., Any], file: str, spec: str) -> Tool:
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        schema = get_json_schema(function)
    except Exception as error:  # by transformers' parser of docstrings
        raise ValueError(
            f"tool {spec!r} must have type hints, and a docstring with an Args section that describes each argument: "
            f"{error}"
        ) from error
    return Tool(function.__name__, file, schema)


def load_tool(spec: str) -> Tool:
    """`file.py:function`."""
    return _tool(user_function(spec, "tool"), str(Path(spec.rpartition(":")[0]).expanduser().resolve()), spec)


def given_tool(function: Any) -> Tool:
    """A function that a caller in Python has at hand."""
    name = getattr(function, "__qualname__", "")
    if not inspect.isfunction(function) or "." in name:
        raise ValueError(
            f"tools must hold functions of a module, which other processes can import, got {function!r:.80}"
        )
    file = inspect.getsourcefile(function)
    if file is None or not Path(file).is_file():
        raise ValueError(f"tool {name!r} is in no file: write it into one, and give tools=[that module's {name}]")
    return _tool(function, str(Path(file).resolve()), name)


def load_tools(specs: Sequence[str], functions: Sequence[Any] = ()) -> list[Tool]:
    """Those that a config names, and those that a caller gives."""
    tools = [load_tool(spec) for spec in specs] + [given_tool(function) for function in functions]
    names = [tool.name for tool in tools]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"tools must have different names, got {twice[0]!r} twice")
    return tools
