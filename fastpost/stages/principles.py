"""A constitution: principles in a YAML file, each with what asks for a critique, for a revision, for a preference.

    - Answers are polite.                                    # a sentence, asked about in the words below; or
    - name: honest
      critique: Say where the answer claims what nobody can know.
      revise: Write the answer again without such claims.
      prefer: Which answer is more honest?

After arXiv:2212.08073, whose critiques and revisions ask about one principle at a time, drawn for each prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from fastpost.files import read_yaml
from fastpost.trainers.loop import seed_of
from fastpost.types import nearest

CRITIQUE = "Say in a few sentences how the answer above goes against this principle, if it does: {}"
REVISE = "Write the answer again so that it agrees with this principle, and nothing but the answer: {}"
PREFER = "The better answer agrees more with this principle: {}"


@dataclass(frozen=True)
class Principle:
    """One of a constitution."""

    name: str
    critique: str
    revise: str
    prefer: str

    @staticmethod
    def of(sentence: str) -> Principle:
        return Principle(sentence, CRITIQUE.format(sentence), REVISE.format(sentence), PREFER.format(sentence))


def read_principles(path: str | PathLike[str]) -> list[Principle]:
    """The principles of a file, which is a list of them."""
    found = read_yaml(path, "constitution")
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} must be a list of principles, `- a sentence` each, got {found!r:.80}")
    principles = [_principle(each, f"{path}, principle {i + 1}") for i, each in enumerate(found)]
    names = [principle.name for principle in principles]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path} has two principles of the name {twice!r}")
    return principles


def _principle(each: Any, where: str) -> Principle:
    if isinstance(each, str) and each.strip():
        return Principle.of(each.strip())
    if not isinstance(each, Mapping):
        raise ValueError(f"{where} must be a sentence, or have name, critique, revise and prefer, got {each!r:.80}")
    known = [f.name for f in fields(Principle)]
    for name in each:
        if name not in known:
            raise ValueError(f"{where} has an unknown key {name!r}{nearest(str(name), known)}")
    missing = [name for name in known if not isinstance(each.get(name), str) or not each[name].strip()]
    if missing:
        raise ValueError(f"{where} must have a text for {' and '.join(missing)}")
    return Principle(**{name: each[name].strip() for name in known})


def drawn(principles: Sequence[Principle], seed: int, turn: str, key: int) -> Principle:
    """The principle that a prompt is asked about in a turn."""
    return principles[seed_of(seed, turn, key) % len(principles)]
