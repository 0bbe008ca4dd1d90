"""What reward functions read: the text of a completion, and the column that it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def text_of(completion: Any) -> str:
    """The text of a completion, or of the last message of one."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def after_thinking(text: str) -> str:
    """What follows the last </think>, or the whole text."""
    return text.rpartition("</think>")[2]


def wanted(answer: Sequence[Any] | None, solution: Sequence[Any] | None) -> Sequence[Any]:
    """The column `answer`, or else `solution`; of each sample, where the data set has both."""
    if answer is None or solution is None:
        found = solution if answer is None else answer
        if found is None:
            raise ValueError("needs a column 'answer' or 'solution'")
        return found
    return [other if one is None else one for one, other in zip(answer, solution, strict=True)]
