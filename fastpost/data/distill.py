"""Rows -> what a teacher is asked about: a completion behind its prompt, a text, or a prompt that is to be answered."""

from __future__ import annotations

from os import PathLike
from typing import Any

from fastpost.data.columns import PROMPTS, format_of, row_at
from fastpost.data.counts import Counts
from fastpost.data.prompts import prompt_examples
from fastpost.data.sft import sft_examples
from fastpost.files import Row, Rows
from fastpost.packing import Example


def _split(row: Row, where: str) -> Row:
    """A conversation as the prompt and the completion that its last turn is."""
    messages = row["messages"]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}, column 'messages' must end with what the assistant answers to a turn before")
    rest = {name: value for name, value in row.items() if name != "messages"}
    return rest | {"prompt": messages[:-1], "completion": messages[-1:]}


def distill_examples(
    rows: Rows,
    tokenizer: Any,
    max_length: int | None,
    max_prompt_length: int | None = None,
    *,
    positions: int | None = None,
    path: str | PathLike[str] = "",
) -> tuple[list[Example], Counts]:
    """One Example a row. Of a conversation the last turn is the completion; of a prompt alone nothing is predicted."""
    wanted = format_of(rows, "distill")
    if wanted in PROMPTS:
        prompts, counts = prompt_examples(rows, tokenizer, max_prompt_length, positions=positions, path=path)
        return [Example(one.input_ids, [False] * len(one.input_ids)) for one in prompts], counts
    if wanted == ("messages",):
        rows = [_split(row, row_at(path, i)) for i, row in enumerate(rows)]
    return sft_examples(rows, tokenizer, max_length, positions=positions, path=path)


def prompt_of(example: Example) -> list[int]:
    """The tokens before the first that is to be predicted; none where a text has no prompt."""
    asked = len(example.input_ids) if not any(example.loss_mask) else example.loss_mask.index(True)
    return example.input_ids[:asked]
