"""Rows -> completions that are desirable or not, for KTO. arXiv:2402.01306."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

from fastpost.data.chat import continued, is_empty, opening
from fastpost.data.columns import PAIRS, format_of, row_at
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


@dataclass(frozen=True)
class _Labelled:
    """A completion with its label, in text or messages."""

    row: Row
    where: str
    prompt: Any
    completion: Any
    label: bool
    implicit: bool = False  # the prompt was found, not given


def _labelled(rows: Rows, path: str | PathLike[str], notes: Counter[str]) -> Iterator[_Labelled]:
    """Of pairs every chosen answer, then every rejected one, as TRL has them: side by side, the two would be each
    other's completion of another prompt."""
    if format_of(rows, "kto") not in PAIRS:
        for i, row in enumerate(rows):
            yield _Labelled(row, row_at(path, i), row["prompt"], row["completion"], row["label"])
        return
    for label in (True, False):
        for i, row in enumerate(rows):
            if row["chosen"] == row["rejected"]:
                notes["identical"] += label
                continue
            where = row_at(path, i)
            prompt, chosen, rejected = split_pair(row, where)
            notes["promptless"] += label and not prompt
            yield _Labelled(row, where, prompt, chosen if label else rejected, label, not has_prompt(row))


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
    for one in _labelled(rows, path, notes):
        begun = opening(tokenizer, one.prompt, one.row, one.where, one.implicit)
        sequence = continued(tokenizer, begun, one.completion, one.row, one.where)
        if sequence is None:
            notes["unaligned"] += 1
            continue
        ids, start = sequence.input_ids[:max_length], sequence.start
        if len(ids) <= max(start, 1):
            notes["masked"] += 1
            continue
        notes["truncated"] += len(ids) < len(sequence.input_ids)
        notes["without_eos"] += tokenizer.eos_token_id not in ids[start:]
        notes["empty"] += is_empty(one.completion)
        found.append(Unpaired(ids[:start], ids[start:], one.label))
    kept = [(joined(one.prompt_ids, one.completion_ids, None),) for one in found]
    return found, counted(len(rows), kept, notes, tokenizer, max_length, positions=positions, path=path)
