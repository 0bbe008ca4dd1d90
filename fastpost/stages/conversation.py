"""Prompts that go on: an answer and the next request behind them, as a conversation or as text."""

from __future__ import annotations

from typing import Any

from fastpost.data import Prompt
from fastpost.data.chat import render


def followed(prompt: Prompt, answer: str, request: str, tokenizer: Any) -> Prompt:
    """The prompt, this answer to it, and a request that the same model is to answer."""
    if isinstance(prompt.prompt, str):
        text = f"{prompt.prompt}{answer.rstrip()}\n\n{request}\n"
        return Prompt(text, tokenizer(text).input_ids, prompt.columns)
    messages = [
        *prompt.prompt,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": request},
    ]
    ids, _ = render(tokenizer, messages, prompt.columns, "a conversation that goes on", open_turn=True)
    return Prompt(messages, ids, prompt.columns)
