"""The rows of a file as each verb would read them: counts, problems, lengths, and a few of the examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastpost.data import (
    Counts,
    Verb,
    distill_examples,
    format_of,
    joined,
    preference_examples,
    prompt_examples,
    reward_examples,
    sft_examples,
    step_examples,
    unpaired_examples,
)
from fastpost.data.columns import IMITATED
from fastpost.doctor.checks import Problems, count_problems, label_problems, template_problems, tokenizer_problems
from fastpost.doctor.columns import kind_of
from fastpost.doctor.config import Doctor
from fastpost.files import Rows
from fastpost.packing import Example

Unit = Mapping[str, Example]  # by name: the sequences of an example
MEASURED = 10_000  # rows whose full lengths are enough for a histogram


@dataclass(frozen=True)
class Source:
    """What is read, and with what."""

    rows: Rows
    tokenizer: Any
    positions: int | None
    config: Doctor

    @property
    def limits(self) -> dict[str, Any]:
        return {"positions": self.positions, "path": self.config.dataset}


@dataclass(frozen=True)
class Reading:
    """What verbs that read alike make of the rows; without counts, they make nothing of them."""

    verbs: tuple[Verb, ...]
    counts: Counts | None
    problems: Problems
    lengths: tuple[int, ...] = ()  # before anything is cut
    samples: tuple[Unit, ...] = ()

    @property
    def sound(self) -> bool:
        return not self.problems.unsound


def _imitated(source: Source) -> tuple[list[Unit], Counts]:
    config = source.config
    examples, counts = sft_examples(
        source.rows,
        source.tokenizer,
        config.max_length,
        config.completion_only_loss,
        config.assistant_only_loss,
        **source.limits,
    )
    return [{"": example} for example in examples], counts


def _compared(source: Source) -> tuple[list[Unit], Counts]:
    pairs, counts = preference_examples(source.rows, source.tokenizer, source.config.max_length, **source.limits)
    return [{"chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs], counts


def _scored(source: Source) -> tuple[list[Unit], Counts]:
    pairs, counts = reward_examples(source.rows, source.tokenizer, source.config.max_length, **source.limits)
    return [{"chosen": _plain(p.chosen.input_ids), "rejected": _plain(p.rejected.input_ids)} for p in pairs], counts


def _labelled(source: Source) -> tuple[list[Unit], Counts]:
    found, counts = unpaired_examples(source.rows, source.tokenizer, source.config.max_length, **source.limits)
    names = {True: "desirable", False: "undesirable"}
    return [{names[one.label]: joined(one.prompt_ids, one.completion_ids, None)} for one in found], counts


def _stepped(source: Source) -> tuple[list[Unit], Counts]:
    found, counts = step_examples(source.rows, source.tokenizer, source.config.max_length, "\n", **source.limits)
    return [{"": _plain(one.input_ids)} for one in found], counts


def _prompted(source: Source) -> tuple[list[Unit], Counts]:
    found, counts = prompt_examples(source.rows, source.tokenizer, source.config.max_prompt_length, **source.limits)
    return [{"": _plain(one.input_ids)} for one in found], counts


def _taught(source: Source) -> tuple[list[Unit], Counts]:
    config = source.config
    found, counts = distill_examples(
        source.rows, source.tokenizer, config.max_length, config.max_prompt_length, **source.limits
    )
    return [{"": example} for example in found], counts


def _plain(ids: list[int]) -> Example:
    """A sequence whose tokens have no loss of their own."""
    return Example(ids, [False] * len(ids))


Reader = Callable[[Source], tuple[list[Unit], Counts]]


def reader_of(rows: Rows, verb: Verb) -> Reader:
    """How a verb reads rows that have one of its formats."""
    if verb == "distill" and format_of(rows, verb) == ("messages",):
        return _taught
    if verb in ("sft", "distill"):
        return _imitated if format_of(rows, verb) in IMITATED else _prompted
    readers: dict[Verb, Reader] = {"reward": _scored, "prm": _stepped, "kto": _labelled}
    return readers.get(verb, _compared if verb in ("dpo", "orpo", "simpo", "cpo") else _prompted)


def _lengths(reader: Reader, source: Source) -> tuple[int, ...]:
    """Tokens of the longest sequence of each example if nothing were cut; of rows evenly spaced, if there are many."""
    every = -(-len(source.rows) // MEASURED)
    rows = source.rows if every == 1 else [source.rows[i] for i in range(0, len(source.rows), every)]
    whole = replace(source, rows=rows, config=replace(source.config, max_length=None, max_prompt_length=None))
    try:
        return tuple(max(len(example.input_ids) for example in unit.values()) for unit in reader(whole)[0])
    except ValueError:
        return ()  # these rows are all dropped


def _spread(units: Sequence[Unit], most: int) -> tuple[Unit, ...]:
    """The first and others, evenly spaced."""
    return tuple(units[i * len(units) // most] for i in range(min(most, len(units))))


def _read(verbs: tuple[Verb, ...], reader: Reader, source: Source, shared: Problems) -> Reading:
    try:
        units, counts = reader(source)
    except ValueError as error:
        return Reading(verbs, None, Problems(unsound=(str(error),)) + shared)
    problems = count_problems(counts) + shared
    if reader is _labelled:
        desirable = sum("desirable" in unit for unit in units)
        problems += label_problems(desirable, len(units) - desirable)
    samples = _spread(units, source.config.samples)
    return Reading(verbs, counts, problems, _lengths(reader, source), samples)


def readings(source: Source, verbs: Sequence[Verb]) -> list[Reading]:
    """A reading for all the verbs that read alike."""
    groups: dict[Reader, list[Verb]] = {}
    for verb in verbs:
        groups.setdefault(reader_of(source.rows, verb), []).append(verb)
    talk = [row for row in source.rows if any(kind_of(value) == "messages" for value in row.values())]
    shared = tokenizer_problems(source.tokenizer) + template_problems(talk, source.tokenizer)
    return [_read(tuple(alike), reader, source, shared) for reader, alike in groups.items()]
