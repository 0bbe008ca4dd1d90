"""Rows -> pairs of whole sequences, whose last tokens a reward model scores.

A sequence that is cut ends in the middle of a sentence, and its score says so: longer ones are left out, as TRL does.
"""

from __future__ import annotations

from collections import Counter
from os import PathLike
from typing import Any

from fastpost.data.chat import whole
from fastpost.data.counts import Counts, counted
from fastpost.data.pairs import Pair, has_prompt, margin_of, read_pairs
from fastpost.files import Row, Rows
from fastpost.packing import Example


def _ends(ids: list[int], tokenizer: Any) -> bool:
    """Whether EOS is the last token but for white space, which some templates write after it."""
    last = next((i for i in reversed(ids) if i == tokenizer.eos_token_id or tokenizer.decode([i]).strip()), None)
    return last is not None and last == tokenizer.eos_token_id


def reward_examples(
    rows: Rows,
    tokenizer: Any,
    max_length: int | None,
    *,
    positions: int | None = None,
    path: str | PathLike[str] = "",
) -> tuple[list[Pair], Counts]:
    """One Pair a row, of sequences with prompt and answer, all of whose tokens are kept; dropped where one is longer
    than max_length, or is a single token."""
    notes: Counter[str] = Counter()

    def read(row: Row, where: str) -> Pair | str:
        both = [row["chosen"], row["rejected"]]
        if has_prompt(row):
            both = [row["prompt"] + answer for answer in both]
        chosen, rejected = (whole(tokenizer, text, row, where).input_ids for text in both)
        if min(len(chosen), len(rejected)) < 2:
            return "masked"
        if max_length is not None and max(len(chosen), len(rejected)) > max_length:
            return "too_long"
        if chosen == rejected:
            return "identical"
        notes["without_eos"] += not (_ends(chosen, tokenizer) and _ends(rejected, tokenizer))
        first, second = (Example(ids, [True] * len(ids)) for ids in (chosen, rejected))
        return Pair(first, second, margin_of(row))

    pairs = read_pairs(rows, path, notes, read)
    kept = [pair.examples for pair in pairs]
    counts = counted(
        len(rows), kept, notes, tokenizer, max_length, positions=positions, path=path, predicts=False, unit="pairs"
    )
    return pairs, counts
