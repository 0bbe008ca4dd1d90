"""Rows -> solutions with a label at the end of each step: TRL's stepwise columns prompt, completions and labels.

A solution is its prompt, and behind it each step with the separator, in tokens of their own; a step's label lies on the
last token of its separator. That is the layout of the PRMTrainer that TRL had, without an EOS, and what scores steps
later (`fastpost.rewards.steps`) writes the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from os import PathLike
from typing import Any

from fastpost.data.chat import Messages, render
from fastpost.data.columns import row_at
from fastpost.data.counts import Counts, counted
from fastpost.files import Row, Rows
from fastpost.packing import Example


@dataclass(frozen=True)
class Stepped:
    """A solution in tokens, and where its steps end."""

    input_ids: list[int]
    ends: list[int]  # index of the last token of each step
    labels: list[float]  # of each: how probably it is right


def prompt_ids(tokenizer: Any, prompt: str | Messages, row: Row, where: str) -> list[int]:
    """Up to where the first step begins."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    return render(tokenizer, prompt, row, where, open_turn=True)[0]


def laid_out(tokenizer: Any, prompt: list[int], steps: Sequence[str], separator: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and its steps, and where each of these ends."""
    between = tokenizer(separator, add_special_tokens=False).input_ids
    if not between:
        raise ValueError(f"step_separator {separator!r} has no tokens")
    parts = [[*tokenizer(step, add_special_tokens=False).input_ids, *between] for step in steps]
    ends = [end - 1 for end in accumulate(map(len, parts), initial=len(prompt))][1:]
    return [*prompt, *(token for part in parts for token in part)], ends


def steps_of(text: str, separator: str) -> list[str]:
    """The steps of a completion, the one that no separator ends among them; of one without a text, that."""
    return [step for step, _ in ended_steps(text, separator)]


def ended_steps(text: str, separator: str) -> list[tuple[str, int]]:
    """The same, each with how much of the text there is where it ends: with its separator, the last one with all that
    follows it."""
    parts = text.split(separator)
    ends = accumulate(len(part) + len(separator) for part in parts)
    found = [(part, end) for part, end in zip(parts, ends, strict=True) if part.strip()] or [(text, len(text))]
    return [*found[:-1], (found[-1][0], len(text))]


def last_tokens(tokenizer: Any, ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Of steps that end where the text of these tokens has so many characters, the index of the last token of each;
    that of the last step is the very last one, an EOS say.

    A token may hold the end of a step and the beginning of the next, and a character be of several tokens, so no
    tokenisation of the parts would do: the text of the first n tokens is looked at.
    """
    text, found = text_of_tokens(tokenizer, ids), [0]

    def has(begun: str, n: int) -> bool:
        return text_of_tokens(tokenizer, ids[: n + 1]).startswith(begun)

    for end in ends[:-1]:
        found.append(bisect_left(range(len(ids) - 1), True, lo=found[-1], key=partial(has, text[:end])))
    return [*found[1:], len(ids) - 1]


def text_of_tokens(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def step_examples(
    rows: Rows,
    tokenizer: Any,
    max_length: int | None,
    step_separator: str,
    *,
    last_only: bool = False,
    positions: int | None = None,
    path: str | PathLike[str] = "",
) -> tuple[list[Stepped], Counts]:
    """One Stepped a row, cut at its end to max_length tokens; dropped where no step ends within them."""
    notes: Counter[str] = Counter()
    found = []
    for i, row in enumerate(rows):
        begun = prompt_ids(tokenizer, row["prompt"], row, row_at(path, i))
        ids, ends = laid_out(tokenizer, begun, row["completions"], step_separator)
        labelled = list(zip(ends, map(float, row["labels"]), strict=True))[-1 if last_only else 0 :]
        kept = [(end, label) for end, label in labelled if max_length is None or end < max_length]
        if not kept:
            notes["masked"] += 1
            continue
        notes["truncated"] += max_length is not None and len(ids) > max_length
        notes["empty"] += any(not step.strip() for step in row["completions"])
        found.append(Stepped(ids[:max_length], *map(list, zip(*kept, strict=True))))  # type: ignore[arg-type]
    kept = [(_marked(one),) for one in found]
    return found, counted(
        len(rows), kept, notes, tokenizer, max_length, positions=positions, path=path, unit="solutions"
    )


def _marked(one: Stepped) -> Example:
    """With its labelled tokens marked, to be counted."""
    ends = set(one.ends)
    return Example(one.input_ids, [i in ends for i in range(len(one.input_ids))])
