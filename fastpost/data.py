"""Files of rows -> token sequences: TRL's column formats, chat templates, and loud checks on the way."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

from fastpost.packing import Example

Row = dict[str, Any]
Rows = Any  # a list of dicts or a datasets.Dataset: both have len, iteration over dicts and integer indexing
Messages = list[dict[str, Any]]
Verb = Literal["sft", "grpo"]


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a file; `str()` is the line that a trainer prints."""

    rows: int
    examples: int
    truncated: int = 0  # kept, cut to max_length
    masked: int = 0  # dropped: no token left to predict
    tokens: int = 0
    predicted: int = 0  # tokens with a loss


@dataclass(frozen=True)
class Prompt:
    """What is generated from, and what the reward functions are given beside it."""

    prompt: str | Messages
    input_ids: list[int]
    columns: Row  # every other column of the row


def read_rows(path: str | PathLike[str]) -> Rows:
    """The rows of a .jsonl, .json or .parquet file, or of a directory that `datasets` saved."""
    raise NotImplementedError


def check_columns(rows: Rows, verb: Verb, path: str | PathLike[str]) -> None:
    """ValueError unless the columns make one of the formats that the verb takes."""
    raise NotImplementedError


def sft_examples(
    rows: Rows,
    tokenizer: Any,
    max_length: int | None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
) -> tuple[list[Example], Counts]:
    """One Example a row of text | messages | prompt + completion."""
    raise NotImplementedError


def prompts(rows: Rows, tokenizer: Any, max_prompt_length: int | None) -> list[Prompt]:
    """One Prompt a row; a prompt longer than max_prompt_length is left out: len(rows) - len(prompts) were."""
    raise NotImplementedError
