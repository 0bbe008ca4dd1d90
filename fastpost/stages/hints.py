"""Prompts that give the answer away, for those that the policy did not find by itself.

What it then says is judged, and trained on, as an answer to the prompt without the hint (rationalisation, STaR,
arXiv:2203.14465): only the tokens that it is asked with are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from string import Formatter
from typing import Any

from fastpost.data import Prompt, prompt_examples


def fields_of(template: str) -> set[str]:
    """What is put into a template like '{prompt}The answer is {answer}.'"""
    try:
        found = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"hint {template!r} is no template: {error}; write {{{{ for a brace") from None
    if "prompt" not in found or not all(name.isidentifier() for name in found):
        raise ValueError(f"hint must have {{prompt}} in it, and columns by their names, got {template!r}")
    return found


def check_hint(template: str, prompts: Sequence[Prompt]) -> None:
    """ValueError for a column that a prompt does not have."""
    for name in fields_of(template) - {"prompt"}:
        if any(prompt.columns.get(name) is None for prompt in prompts):
            raise ValueError(f"hint has {{{name}}} in it, and the dataset has rows without {name!r}")


def hinted(prompts: Sequence[Prompt], template: str, tokenizer: Any, tools: list[Any] | None = None) -> list[Prompt]:
    """The same prompts, asked with the tokens of the hint."""
    rows = [{**prompt.columns, "prompt": _with_hint(prompt, template)} for prompt in prompts]
    asked, _ = prompt_examples(rows, tokenizer, None, tools=tools)
    return [replace(prompt, input_ids=other.input_ids) for prompt, other in zip(prompts, asked, strict=True)]


def _with_hint(prompt: Prompt, template: str) -> Any:
    """Of a conversation its last message."""
    if isinstance(prompt.prompt, str):
        return template.format(**(prompt.columns | {"prompt": prompt.prompt}))
    *before, last = prompt.prompt
    return [*before, last | {"content": template.format(**(prompt.columns | {"prompt": last["content"]}))}]
