"""What a step consumed, on the disk, for samplers that would not give it again: OUT/rollouts/step-N.json.

A run that stops and resumes comes to steps that it has taken before, and takes the same completions. Each rank writes
what it sampled, and reads by the key of the prompt what any rank did, so that another number of ranks may resume.
A record of another question (prompt, settings, number of completions, or `run`) is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastpost.models.saving import written_aside
from fastpost.rollout.sampler import Sampler
from fastpost.rollout.sampling import Completion, Sampling

FILE = re.compile(r"step-(\d+)(\.rank-\d+)?\.json")


@dataclass(frozen=True)
class Asked:
    """What a sampler is asked in a step."""

    prompt_ids: Sequence[Sequence[int]]
    keys: Sequence[int]
    sampling: Sampling
    num_generations: int
    run: str = ""  # of whatever else decides what is sampled, the weights above all

    def question(self, i: int) -> Any:
        """Of one prompt, as JSON gives it back."""
        of = [list(self.prompt_ids[i]), asdict(self.sampling), self.num_generations, self.run]
        return json.loads(json.dumps(of))


@dataclass(frozen=True)
class Where:
    """A rank's place among the records of a run."""

    output: Path
    rank: int = 0

    @property
    def directory(self) -> Path:
        return self.output / "rollouts"

    def name(self, step: int) -> str:
        return f"step-{step}.json" if not self.rank else f"step-{step}.rank-{self.rank}.json"


def _files(where: Where) -> list[tuple[int, Path]]:
    """Steps and their records, of all ranks."""
    found = [(FILE.fullmatch(path.name), path) for path in sorted(where.directory.glob("step-*.json"))]
    return [(int(match[1]), path) for match, path in found if match]


def write(where: Where, step: int, asked: Asked, completions: Sequence[Completion]) -> None:
    """Whole or not at all; beside those of other prompts, as a step may ask several times."""
    n, path = asked.num_generations, where.directory / where.name(step)
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    settings = asked.question(0)[1:]
    groups = {key: group for key, group in there.items() if group[0][1:] == settings} | {
        str(key): [asked.question(i), [asdict(completion) for completion in completions[i * n : (i + 1) * n]]]
        for i, key in enumerate(asked.keys)
    }
    with written_aside(where.directory) as aside:
        (aside / where.name(step)).write_text(json.dumps(groups), encoding="utf-8")


def read(where: Where, step: int, asked: Asked) -> list[Completion] | None:
    """The completions of this step; None where some prompt of it has none."""
    groups: dict[str, Any] = {}
    for of, path in _files(where):
        if of == step:
            groups |= json.loads(path.read_text(encoding="utf-8"))
    found: list[Completion] = []
    for i, key in enumerate(asked.keys):
        question, completions = groups.get(str(key), (None, []))
        if question != asked.question(i):
            return None
        found += [Completion(**completion) for completion in completions]
    return found


def prune(where: Where, step: int) -> None:
    """Removes records of steps before `step`, that of the oldest checkpoint which is kept: none resumes before it."""
    for of, path in _files(where):
        if of < step:
            path.unlink(missing_ok=True)


def sampled(sampler: Sampler, asked: Asked, where: Where | None, step: int) -> list[Completion]:
    """The completions of a step: sampled, or, where sampling would not repeat them, as they were recorded. where None:
    nothing is recorded."""
    records = None if sampler.reproducible else where
    found = None if records is None else read(records, step, asked)
    if found is None:
        found = sampler(asked.prompt_ids, asked.sampling, asked.num_generations, asked.keys)
        if records is not None:
            write(records, step, asked, found)
    return found
