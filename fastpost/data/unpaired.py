"""Rows -> completions that are desirable or not, for KTO. arXiv:2402.01306."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

from fastpost.data.chat import continued, is_empty, opening
from fastpost.data.columns import row_at
from fastpost.data.counts import Counts, counted
from fastpost.data.pairs import has_prompt, split_pair
from fastpost.files import Row, Rows
from fastpost.packing import Example


@dataclass(frozen=True)
class Unpaired:
    """A prompt and its completion, apart, so that a prompt can be joined with the completion of another."""

    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool  # desirable


def joined(prompt_ids: list[int], completion_ids: list[int], max_length: int | None) -> Example:
    """A prompt and a completion, its own or another's, cut at the end; the prompt carries no loss."""
    ids = (prompt_ids + completion_ids)[:max_length]
    return Example(ids, [t >= len(prompt_ids) for t in range(len(ids))])


def _labelled(rows: Rows, path: str | PathLike[str], notes: Counter[str]) -> Iterator[tuple[Row, str, Any, Any, bool]]:
    """(row, where, prompt, completion, label). Of pairs every chosen answer, then every rejected one, as TRL has them:
    side by side, the two would be each other's completion of another prompt."""
    if "chosen" not in rows[0]:
        for i, row in enumerate(rows):
            yield row, row_at(path, i), row["prompt"], row["completion"], row["label"]
        return
    for label in (True, False):
        for i, row in enumerate(rows):
            if row["chosen"] == row["rejected"]:
                notes["identical"] += label
                continue
            prompt, chosen, rejected = split_pair(row, row_at(path, i))
            notes["promptless"] += label and not prompt
            yield row, row_at(path, i), prompt, chosen if label else rejected, label


def unpaired_examples(
    rows: Rows,
    tokenizer: Any,
    max_length: int | None,
    *,
    positions: int | None = None,
    path: str | PathLike[str] = "",
) -> tuple[list[Unpaired], Counts]:
    """One Unpaired a row, two a pair; the completion is cut so that max_length tokens hold it and its prompt."""
    notes: Counter[str] = Counter()
    found = []
    for row, where, prompt, completion, label in _labelled(rows, path, notes):
        begun = opening(tokenizer, prompt, row, where, implicit="chosen" in row and not has_prompt(row))
        sequence = continued(tokenizer, begun, completion, row, where)
        if sequence is None:
            notes["unaligned"] += 1
            continue
        ids, start = sequence.input_ids[:max_length], sequence.start
        if len(ids) <= max(start, 1):
            notes["masked"] += 1
            continue
        notes["truncated"] += len(ids) < len(sequence.input_ids)
        notes["without_eos"] += tokenizer.eos_token_id not in ids[start:]
        notes["empty"] += is_empty(completion)
        found.append(Unpaired(ids[:start], ids[start:], label))
    kept = [(joined(one.prompt_ids, one.completion_ids, None),) for one in found]
    return found, counted(len(rows), kept, notes, tokenizer, max_length, positions=positions)
