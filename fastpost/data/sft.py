"""Rows -> sequences to imitate: text, messages, or prompt + completion."""

from __future__ import annotations

from collections import Counter
from os import PathLike
from typing import Any

from fastpost.data.chat import Continued, check_generation_mask, continued, is_empty, opening, whole
from fastpost.data.columns import row_at
from fastpost.data.counts import Counts, counted
from fastpost.files import Row, Rows
from fastpost.packing import Example


def _answer(row: Row) -> Any:
    """What is to be learnt of a row."""
    return row["completion"] if "prompt" in row and "completion" in row else row.get("messages", row.get("text"))


def _sequence(row: Row, tokenizer: Any, assistant_only: bool, where: str) -> Continued | None:
    """The tokens of a row; None if where its completion begins cannot be told."""
    if "prompt" not in row or "completion" not in row:
        return whole(tokenizer, _answer(row), row, where, assistant_only)
    begun = opening(tokenizer, row["prompt"], row, where)
    return continued(tokenizer, begun, row["completion"], row, where, assistant_only)


def sft_examples(
    rows: Rows,
    tokenizer: Any,
    max_length: int | None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    *,
    positions: int | None = None,
    path: str | PathLike[str] = "",
) -> tuple[list[Example], Counts]:
    """One Example a row. completion_only_loss None: where there is a prompt, its tokens carry no loss."""
    first = rows[0]
    if completion_only_loss and "prompt" not in first:
        raise ValueError(
            "completion_only_loss needs the columns 'prompt' and 'completion'; messages have assistant_only_loss"
        )
    if assistant_only_loss:
        check_generation_mask(first, tokenizer)
    notes: Counter[str] = Counter()
    examples = []
    for i, row in enumerate(rows):
        sequence = _sequence(row, tokenizer, assistant_only_loss, row_at(path, i))
        if sequence is None:
            notes["unaligned"] += 1
            continue
        mask = sequence.mask if completion_only_loss is False else sequence.completion_mask(sequence.start)
        kept = sequence.input_ids[:max_length], mask[:max_length]
        if not any(kept[1][1:]):
            notes["masked"] += 1
            continue
        example = Example(*kept)
        notes["truncated"] += len(example.input_ids) < len(sequence.input_ids)
        notes["empty"] += is_empty(_answer(row))
        notes["without_eos"] += tokenizer.eos_token_id not in [example.input_ids[t] for t in example.predicted]
        examples.append(example)
    return examples, counted(
        len(rows), [(e,) for e in examples], notes, tokenizer, max_length, positions=positions, path=path
    )
