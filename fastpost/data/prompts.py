"""Rows -> prompts: what reinforcement learning and on-policy distillation generate from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

from fastpost.data.chat import Messages, render
from fastpost.data.columns import row_at
from fastpost.data.counts import Counts, counted
from fastpost.files import Row, Rows
from fastpost.packing import Example


@dataclass(frozen=True)
class Prompt:
    """What is generated from, and what the reward functions are given beside it."""

    prompt: str | Messages
    input_ids: list[int]
    columns: Row  # every other column of the rows; None where this one does not have it

    def answered(self, text: str) -> str | Messages:
        """A conversation is answered by a message, a text by a text."""
        return text if isinstance(self.prompt, str) else [{"role": "assistant", "content": text}]


def prompt_examples(
    rows: Rows,
    tokenizer: Any,
    max_prompt_length: int | None,
    *,
    positions: int | None = None,
    path: str | PathLike[str] = "",
    tools: list[Any] | None = None,
) -> tuple[list[Prompt], Counts]:
    """One Prompt a row; a prompt longer than max_prompt_length is left out: the end of it is what asks.

    `tools`: there may be several turns, and these are the schemas of what the chat template shows.
    """
    notes: Counter[str] = Counter()
    found = []
    for i, row in enumerate(rows):
        prompt, where = row["prompt"], row_at(path, i)
        if tools is not None:
            _check_turns(row, where)
        if isinstance(prompt, str):
            ids = tokenizer(prompt).input_ids
        else:
            ids, _ = render(tokenizer, prompt, row if tools is None else {**row, "tools": tools}, where, open_turn=True)
        if not ids:
            raise ValueError(f"{where}: the prompt {prompt!r} has no tokens, so there is nothing to generate from")
        if max_prompt_length is not None and len(ids) > max_prompt_length:
            notes["too_long"] += 1
            continue
        found.append(Prompt(prompt, ids, {name: value for name, value in row.items() if name != "prompt"}))
    names = dict.fromkeys(name for one in found for name in one.columns)
    found = [replace(one, columns={name: one.columns.get(name) for name in names}) for one in found]
    if not found:
        of = f" of {path}" if path else ""
        raise ValueError(f"every prompt{of} is longer than max_prompt_length, {max_prompt_length} tokens")
    kept = [(Example(one.input_ids, [False] * len(one.input_ids)),) for one in found]
    counts = counted(
        len(rows), kept, notes, tokenizer, max_prompt_length, positions=positions, predicts=False, unit="prompts"
    )
    return found, counts


def _check_turns(row: Row, where: str) -> None:
    if isinstance(row["prompt"], str):
        raise ValueError(f"{where}: turns need a conversation, but the prompt is text: write it as a list of messages")
    if row.get("tools"):
        raise ValueError(f"{where} has a column 'tools' of its own, beside the tools of the run: leave out one of them")


def prompts(rows: Rows, tokenizer: Any, max_prompt_length: int | None) -> list[Prompt]:
    """The prompts alone: len(rows) - len(prompts) of them were too long."""
    return prompt_examples(rows, tokenizer, max_prompt_length)[0]
