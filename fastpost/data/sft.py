"""Rows -> sequences to imitate: text, messages, or prompt + completion."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fastpost.data.chat import check_generation_mask, common_prefix, ended, render
from fastpost.data.counts import Counts
from fastpost.files import Row, Rows
from fastpost.packing import Example


def _sequence(
    row: Row, tokenizer: Any, completion_only: bool, assistant_only: bool, where: str
) -> tuple[list[int], list[bool]] | None:
    """Token ids and loss mask of a row; None if where its completion begins cannot be told."""
    if "prompt" not in row or "completion" not in row:
        if "messages" in row:
            return render(tokenizer, row["messages"], row, where, assistant_only)
        ids = tokenizer(ended(row["text"], tokenizer)).input_ids
        return ids, [True] * len(ids)
    if isinstance(row["prompt"], str):
        prompt = tokenizer(row["prompt"]).input_ids
        ids = tokenizer(ended(row["prompt"] + row["completion"], tokenizer)).input_ids
        if ids[: len(prompt)] != prompt:
            # A token straddles the boundary: the model must see the prompt as it will when it generates.
            ids = prompt + tokenizer(ended(row["completion"], tokenizer), add_special_tokens=False).input_ids
        start = len(prompt)
        mask = [True] * len(ids)
    else:
        ids, mask = render(tokenizer, row["prompt"] + row["completion"], row, where, assistant_only)
        bare, _ = render(tokenizer, row["prompt"], row, where)
        opened, _ = render(tokenizer, row["prompt"], row, where, open_turn=True)
        if ids[: len(bare)] != bare:
            return None
        start = max(len(bare), common_prefix(ids, opened))
    if completion_only:
        mask = [False] * start + mask[start:]
    return ids, mask


def sft_examples(
    rows: Rows,
    tokenizer: Any,
    max_length: int | None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
) -> tuple[list[Example], Counts]:
    """One Example a row. completion_only_loss None: where there is a prompt, its tokens carry no loss."""
    first = rows[0]
    if completion_only_loss and "prompt" not in first:
        raise ValueError(
            "completion_only_loss needs the columns 'prompt' and 'completion'; messages have assistant_only_loss"
        )
    if assistant_only_loss:
        check_generation_mask(first, tokenizer)
    counter: Counter[str] = Counter()
    examples = []
    for i, row in enumerate(rows):
        counter["rows"] += 1
        sequence = _sequence(row, tokenizer, completion_only_loss is not False, assistant_only_loss, f"row {i}")
        if sequence is None:
            counter["unaligned"] += 1
            continue
        ids, mask = sequence
        kept = ids[:max_length], mask[:max_length]
        if not any(kept[1][1:]):
            counter["masked"] += 1
            continue
        counter["truncated"] += len(kept[0]) < len(ids)
        predicted = [token for token, wanted in zip(kept[0][1:], kept[1][1:], strict=True) if wanted]
        counter["without_eos"] += tokenizer.eos_token_id not in predicted
        counter["tokens"] += len(kept[0])
        counter["predicted"] += len(predicted)
        examples.append(Example(*kept))
    names = ("rows", "tokens", "predicted", "truncated", "masked", "unaligned", "without_eos")
    counts = Counts(examples=len(examples), **{name: counter[name] for name in names})
    if not examples:
        raise ValueError(f"no row is left to train on: {counts}" + ("" if max_length is None else f" ({max_length})"))
    return examples, counts
