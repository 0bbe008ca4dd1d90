"""Rows -> pairs whose answers are weighed token by token: DPO and its kin.

The prompt carries no loss. Where a token would straddle its end, it is split, so that the model is trained on the
prompt that it will see; TRL drops the end of the prompt. An implicit prompt of text ends with a token, as in TRL.
"""

from __future__ import annotations

from collections import Counter
from os import PathLike
from typing import Any

from fastpost.data.chat import continued, opening
from fastpost.data.counts import Counts, counted
from fastpost.data.pairs import Pair, has_prompt, margin_of, probability_of, read_pairs, split_pair
from fastpost.files import Row, Rows
from fastpost.packing import Example


def preference_examples(
    rows: Rows,
    tokenizer: Any,
    max_length: int | None,
    *,
    positions: int | None = None,
    path: str | PathLike[str] = "",
    soft_labels: bool = False,
) -> tuple[list[Pair], Counts]:
    """One Pair a row, each half cut at its end to max_length tokens; dropped where one has no answer left. soft_labels:
    the column `probability` is read."""
    notes: Counter[str] = Counter()

    def read(row: Row, where: str) -> Pair | str:
        prompt, *answers = split_pair(row, where)
        begun = opening(tokenizer, prompt, row, where, implicit=not has_prompt(row))
        both = [sequence for answer in answers if (sequence := continued(tokenizer, begun, answer, row, where))]
        if len(both) < 2:
            return "unaligned"
        start = min(sequence.start for sequence in both)
        cut = [Example(s.input_ids[:max_length], s.completion_mask(start)[:max_length]) for s in both]
        if not all(example.predicted for example in cut):
            return "masked"
        if cut[0] == cut[1]:
            return "identical"
        notes["truncated"] += any(len(e.input_ids) < len(s.input_ids) for e, s in zip(cut, both, strict=True))
        notes["without_eos"] += any(tokenizer.eos_token_id not in e.input_ids[start:] for e in cut)
        notes["promptless"] += not prompt
        return Pair(cut[0], cut[1], margin_of(row), probability_of(row, where) if soft_labels else None)

    pairs = read_pairs(rows, path, notes, read)
    kept = [pair.examples for pair in pairs]
    return pairs, counted(len(rows), kept, notes, tokenizer, max_length, positions=positions, path=path, unit="pairs")
