"""What the policy said in a turn -> a message, and the calls of tools in it.

By the tokenizer's own `parse_response` where it has a response_template; else in the format of Hermes and Qwen,
<tool_call>{"name": ..., "arguments": {...}}</tool_call>. What was meant for a call and is none gets an answer as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
BLOCK = re.compile(r"\s*<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
RIGHT = '<tool_call>{"name": "tool", "arguments": {"argument": "value"}}</tool_call>'


@dataclass(frozen=True)
class Call:
    """Of a tool, if there is one of this name."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """A turn of the policy."""

    message: Message
    calls: list[Call] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # what was meant for a call, and why it is none


Parser = Callable[[Sequence[int], Sequence[int]], Reply]  # (tokens before the turn, tokens of it)


def _call(block: str) -> Call | str:
    """Of the JSON in a block; or what is wrong with it."""
    try:
        found = _rendered(json.loads(block))
    except (ValueError, RecursionError) as error:
        return f"the call is not JSON: {error}. A call is {RIGHT}"
    arguments = found.get("arguments", {}) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not isinstance(arguments, dict):
        return f"a call has a name, and arguments by their names: {RIGHT}"
    return Call(found["name"], arguments)


def _rendered(found: Any) -> Any:
    """The same, if a template can write it. A ValueError: it has half of a character; a RecursionError: it is nested by
    the thousand."""
    json.dumps(found, ensure_ascii=False).encode()
    return found


def _message(content: str, calls: Sequence[Call]) -> Message:
    made = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls]
    return {"role": "assistant", "content": content} | ({"tool_calls": made} if made else {})


def hermes(text: str) -> Reply:
    """By the marks of Hermes and Qwen. A block that is no call stays in the content."""
    calls: list[Call] = []
    wrong: list[str] = []

    def taken(match: re.Match[str]) -> str:
        found = _call(match[1])
        if isinstance(found, Call):
            calls.append(found)
            return ""
        wrong.append(found)
        return match[0]

    content = BLOCK.sub(taken, text)
    return Reply(_message(content, calls), calls, wrong)


def _by_template(tokenizer: Any, tools: list[Any]) -> Parser:
    def parse(before: Sequence[int], ids: Sequence[int]) -> Reply:
        try:
            found = _rendered(tokenizer.parse_response(list(ids), prefix=list(before), tools=tools or None))
            functions = [call["function"] for call in found.get("tool_calls") or []]
            calls = [Call(function["name"], dict(function["arguments"])) for function in functions]
        except Exception as error:  # as many kinds as there are formats
            return Reply(_message(plain(tokenizer, ids), []), [], [f"the call could not be read: {error}"])
        rest = {name: value for name, value in found.items() if name not in ("role", "content", "tool_calls")}
        return Reply(_message(found.get("content") or "", calls) | rest, calls)

    return parse


def plain(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a turn, marks of calls included, without the token that ends it."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    last = tokenizer.decode(list(ids[-1:]), skip_special_tokens=False) if len(ids) else ""
    return text.removesuffix(last) if len(ids) and ids[-1] in tokenizer.all_special_ids else text


def parser_of(tokenizer: Any, tools: list[Any]) -> tuple[str, Parser]:
    """The parser and its name, of a tokenizer and the schemas of tools."""
    if getattr(tokenizer, "response_template", None) is not None:
        return "response_template", _by_template(tokenizer, tools)
    return "hermes", lambda _, ids: hermes(plain(tokenizer, ids))
