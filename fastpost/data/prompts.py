"""Rows -> prompts: what reinforcement learning and on-policy distillation generate from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastpost.data.chat import Messages, render
from fastpost.files import Row, Rows


@dataclass(frozen=True)
class Prompt:
    """What is generated from, and what the reward functions are given beside it."""

    prompt: str | Messages
    input_ids: list[int]
    columns: Row  # every other column of the row


def prompts(rows: Rows, tokenizer: Any, max_prompt_length: int | None) -> list[Prompt]:
    """One Prompt a row; a prompt longer than max_prompt_length is left out: len(rows) - len(prompts) of them."""
    found = []
    for i, row in enumerate(rows):
        prompt = row["prompt"]
        if isinstance(prompt, str):
            ids = tokenizer(prompt).input_ids
        else:
            ids, _ = render(tokenizer, prompt, row, f"row {i}", open_turn=True)
        if not ids:
            raise ValueError(f"row {i}: the prompt {prompt!r} has no tokens, so there is nothing to generate from")
        if max_prompt_length is None or len(ids) <= max_prompt_length:
            found.append(Prompt(prompt, ids, {name: value for name, value in row.items() if name != "prompt"}))
    if not found:
        raise ValueError(f"every prompt is longer than max_prompt_length, {max_prompt_length} tokens")
    return found
