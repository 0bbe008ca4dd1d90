"""Answers compared with the right one: as texts, as numbers, as the letter of a choice.

The right one is in the column `answer`, or `solution`; where it is empty the sample is not judged (None).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from fastpost.rewards.texts import after_thinking, text_of, wanted

# A minus is a sign unless it follows what may be an operand: the last number of "5-3" is 3, of "x = -3" it is -3.
NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z_)\]])-)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|(?<![0-9A-Za-z_)\].])\.[0-9]+)"
)
# How a choice is given, the surest way first. A letter that a word of a sentence follows may be the article.
CHOICES = (
    re.compile(r"\\boxed\{\s*(?:\\text\w*\{)?\s*\(?([A-Z])\)?[^A-Za-z]*\}"),
    re.compile(r"(?i:answer|choice|option)(?i:\s+is)?\s*:?[\s*_]*\(?([A-Z])(?![\w'])(?!\s+(?!because|since|as)[a-z])"),
    re.compile(r"\(([A-Z])\)"),
    re.compile(r"^\W*([A-Z])(?![\w'])(?!\s+[a-z])", re.MULTILINE),
)


def exact_match(
    completions: Sequence[Any], answer: Sequence[Any] | None = None, solution: Sequence[Any] | None = None, **_: Any
) -> list[float | None]:
    """1 where the completion is the answer, spaces around both aside; else 0."""
    return _judged(completions, wanted(answer, solution), lambda text, right: text.strip() == str(right).strip())


def number_match(
    completions: Sequence[Any], answer: Sequence[Any] | None = None, solution: Sequence[Any] | None = None, **_: Any
) -> list[float | None]:
    """1 where the last number of the completion is the last number of the answer; else 0."""
    right = [one if one is None else _number_in_answer(one) for one in wanted(answer, solution)]
    return _judged(completions, right, lambda text, number: last_number(text) == number)


def choice_match(
    completions: Sequence[Any], answer: Sequence[Any] | None = None, solution: Sequence[Any] | None = None, **_: Any
) -> list[float | None]:
    """1 where the letter that the completion chooses is the answer's; else 0.

    It is looked for after </think>: in the last \\boxed{}, else after the last "answer is", "Answer:", "option", else
    in the last (X), else at the start of the last line that begins with a letter alone.
    """
    right = [one if one is None else _letter_in_answer(one) for one in wanted(answer, solution)]
    return _judged(completions, right, lambda text, letter: chosen(text) == letter)


def _judged(completions: Sequence[Any], right: Sequence[Any], same: Callable[[str, Any], bool]) -> list[float | None]:
    return [
        None if one is None else float(same(text_of(completion), one))
        for completion, one in zip(completions, right, strict=True)
    ]


def last_number(text: str) -> Decimal | None:
    """The last number that is written in a text, exactly; thousands may have commas."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _number_in_answer(right: Any) -> Decimal:
    number = last_number(str(right))
    if number is None:
        raise ValueError(f"the answer {right!r} has no number in it")
    return number


def chosen(text: str) -> str | None:
    """The letter of a choice that a text gives as its answer."""
    text = after_thinking(text)
    return next((found[-1] for pattern in CHOICES if (found := pattern.findall(text))), None)


def _letter_in_answer(right: Any) -> str:
    letter = str(right).strip().strip("().").upper()
    if len(letter) != 1 or not "A" <= letter <= "Z":
        raise ValueError(f"the answer {right!r} is not a letter from A to Z")
    return letter
