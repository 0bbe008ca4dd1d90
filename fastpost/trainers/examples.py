"""Rows -> examples, and what `fastpost doctor` says of them: a run says it before it trains, and run.json keeps it.

What makes training unsound is said as such, and the run goes on: who wants a pipeline to stop there asks the doctor
first, whose exit code tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from fastpost.data import Counts, Verb, format_of
from fastpost.doctor.checks import Problems, count_problems, overlap, template_problems, tokenizer_problems
from fastpost.files import Rows
from fastpost.trainers.log import say

E = TypeVar("E")
ALWAYS = ("rows", "examples", "tokens", "longest", "unit")  # what is shown of counts, be it 0


def read_examples(
    rows: Mapping[str, Rows],  # "train" and perhaps "eval", their columns checked
    verb: Verb,
    tokenizer: Any,
    read: Callable[[str, Rows], tuple[list[E], Counts]],
) -> tuple[dict[str, list[E]], dict[str, dict[str, Any]]]:
    """The examples of each, and what became of its rows."""
    data, facts = {}, {}
    for name, part in rows.items():
        data[name], counts = read(name, part)
        say(f"{name}: {counts}")
        if name == "train":
            problems = _problems(part, verb, counts, tokenizer)
        else:
            problems = Problems(odd=tuple(overlap(rows["train"], part).lines))
        say_problems(name, problems)
        facts[name] = _facts(counts, problems)
    return data, facts


def say_problems(name: str, problems: Problems) -> None:
    """The gravest first."""
    for line in problems.unsound:
        say(f"UNSOUND: {name}: {line}")
    for line in problems.odd:
        say(f"warning: {name}: {line}")


def _problems(rows: Rows, verb: Verb, counts: Counts, tokenizer: Any) -> Problems:
    """What the line of the counts does not say yet."""
    found = Problems(unsound=count_problems(counts).unsound)
    talks = any(_is_conversation(rows[0][name]) for name in format_of(rows, verb) or ())
    return found + tokenizer_problems(tokenizer) + template_problems(rows if talks else [], tokenizer)


def _is_conversation(value: Any) -> bool:
    """And not the steps of a solution."""
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


def _facts(counts: Counts, problems: Problems) -> dict[str, Any]:
    """For run.json."""
    everything = asdict(counts) | asdict(problems)
    return {name: value for name, value in everything.items() if value or name in ALWAYS}
