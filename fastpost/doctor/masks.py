"""A sequence as lines of text, with what is trained of it in color, or in [brackets] where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from fastpost.packing import Example

GREEN, DIM, RESET = "\033[32m", "\033[2m", "\033[0m"


def clean(text: str) -> str:
    """The text on one line; nothing in it can move the cursor or change a color."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def clipped(text: str, most: int) -> str:
    """The text, or its two ends."""
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]} … {text[len(text) - half :]}"


def runs(example: Example, tokenizer: Any, most: int) -> Iterator[tuple[str, bool]]:
    """The text of tokens that are trained, or are not, one after the other."""
    predicted = set(example.predicted)
    marked = [(token, t in predicted) for t, token in enumerate(example.input_ids)]
    for trained, run in groupby(marked, key=lambda pair: pair[1]):
        yield clipped(clean(tokenizer.decode([token for token, _ in run])), most), trained


def masked(example: Example, tokenizer: Any, color: bool, width: int, most: int = 240) -> list[str]:
    """Lines of at most `width` characters; of a run of tokens at most `most`."""
    colors = {True: GREEN, False: DIM} if color else {True: "", False: ""}
    shown = [
        (text if color or not trained else f"[{text}]", trained) for text, trained in runs(example, tokenizer, most)
    ]
    letters = [(letter, colors[trained]) for text, trained in shown for letter in text]
    return [_painted(letters[start : start + width]) for start in range(0, len(letters), width)]


def _painted(letters: list[tuple[str, str]]) -> str:
    parts = [(code, "".join(letter for letter, _ in run)) for code, run in groupby(letters, key=lambda pair: pair[1])]
    return "".join(f"{code}{text}{RESET}" if code else text for code, text in parts)
