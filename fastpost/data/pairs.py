"""Two answers to one prompt, which may be a column of its own or what both answers begin with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from fastpost.data.chat import Messages, common_prefix, is_empty
from fastpost.data.columns import row_at
from fastpost.files import Row, Rows
from fastpost.packing import Example

Answer = str | Messages


@dataclass(frozen=True)
class Pair:
    """The better answer and the worse one, each with the prompt before it."""

    chosen: Example
    rejected: Example
    margin: float | None = None  # by how much it is better, if the rows say so
    probability: float | None = None  # that it is better, if that is asked of the rows
    ref_logp: tuple[Sequence[float], Sequence[float]] | None = None  # of the predicted tokens of each, once it is known

    @property
    def examples(self) -> tuple[Example, Example]:
        """As a loss of pairs has them."""
        return self.chosen, self.rejected


def has_prompt(row: Row) -> bool:
    """Whether the prompt stands apart: beside two conversations, a text is only a copy of how they begin."""
    return "prompt" in row and isinstance(row["prompt"], str) == isinstance(row["chosen"], str)


def split_pair(row: Row, where: str) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected). An implicit prompt is what both begin with; something is left of each."""
    chosen, rejected = row["chosen"], row["rejected"]
    if has_prompt(row):
        return row["prompt"], chosen, rejected
    end = common_prefix(chosen, rejected)
    if end and (end == min(len(chosen), len(rejected)) or chosen[end - 1] == " "):
        end -= 1  # tokenizers have a space with the word that follows
    if not end and not isinstance(chosen, str):
        raise ValueError(f"{where}: chosen and rejected begin with different messages, so they have no prompt")
    return chosen[:end], chosen[end:], rejected[end:]


def read_pairs(
    rows: Rows,
    path: str | PathLike[str],
    notes: Counter[str],
    read: Callable[[Row, str], Pair | str],  # a row and where it is -> a pair, or why it is dropped
) -> list[Pair]:
    """The pairs of the rows that have a difference; what became of the others is added to the notes."""
    found = []
    for i, row in enumerate(rows):
        pair = "identical" if row["chosen"] == row["rejected"] else read(row, row_at(path, i))
        if isinstance(pair, str):
            notes[pair] += 1
            continue
        notes["empty"] += is_empty(row["chosen"]) or is_empty(row["rejected"])
        found.append(pair)
    return found


def margin_of(row: Row) -> float | None:
    margin = row.get("margin")
    return None if margin is None else float(margin)


def probability_of(row: Row, where: str) -> float:
    """That the chosen answer is the better one."""
    found = row.get("probability")
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= 1:
        said = "nothing" if found is None else repr(found)
        raise ValueError(f"{where}, column 'probability' must be a number from 0 to 1 for soft_labels, got {said:.60}")
    return float(found)
