"""Verifiers that come with fastpost, in the signature of a user's own: f(completions, columns..., **rest) -> rewards.

A completion is a text or a list of messages; a sample whose column is empty is not judged (None).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

# A minus is a sign unless it follows what may be an operand: the last number of "5-3" is 3, of "x = -3" it is -3.
NUMBER = re.compile(r"(?:(?<![0-9A-Za-z_)\]])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
THINK = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*", re.DOTALL)


def text_of(completion: Any) -> str:
    """The text of a completion, or of the last message of one."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def exact_match(
    completions: Sequence[Any], answer: Sequence[Any] | None = None, solution: Sequence[Any] | None = None, **_: Any
) -> list[float | None]:
    """1 where the completion is the answer (column `answer`, or `solution`), spaces around both aside; else 0."""
    wanted = _column(answer, solution)
    return [
        None if right is None else float(text_of(completion).strip() == str(right).strip())
        for completion, right in zip(completions, wanted, strict=True)
    ]


def number_match(
    completions: Sequence[Any], answer: Sequence[Any] | None = None, solution: Sequence[Any] | None = None, **_: Any
) -> list[float | None]:
    """1 where the last number of the completion is the last number of the answer (column `answer`, or `solution`)."""
    wanted = _column(answer, solution)
    return [
        None if right is None else float(_same_number(text_of(completion), _number_in_answer(right)))
        for completion, right in zip(completions, wanted, strict=True)
    ]


def think_format(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 where the completion is one <think>...</think> and then an answer; else 0."""
    return [float(THINK.fullmatch(text_of(completion)) is not None) for completion in completions]


def _column(answer: Sequence[Any] | None, solution: Sequence[Any] | None) -> Sequence[Any]:
    found = solution if answer is None else answer
    if found is None:
        raise ValueError("needs a column 'answer' or 'solution'")
    return found


def last_number(text: str) -> Decimal | None:
    """The last number that is written in a text, exactly; thousands may have commas."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _number_in_answer(right: Any) -> Decimal:
    number = last_number(str(right))
    if number is None:
        raise ValueError(f"the answer {right!r} has no number in it")
    return number


def _same_number(text: str, right: Decimal) -> bool:
    return last_number(text) == right


BUILTIN = {function.__name__: function for function in (exact_match, number_match, think_format)}
