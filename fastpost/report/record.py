"""What a run left in its directory. Only metrics.jsonl must be there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastpost.trainers.log import read_lines
from fastpost.watching.curves import Points, curve
from fastpost.watching.warnings import RunWarning, warnings


@dataclass(frozen=True)
class Record:
    directory: Path
    lines: list[dict[str, Any]]  # of metrics.jsonl
    completions: list[dict[str, Any]]  # of completions.jsonl
    facts: dict[str, Any]  # run.json

    def __call__(self, *names: str) -> Points:
        """The first of these metrics that the run has."""
        return curve(self.lines, *names)

    @property
    def config(self) -> dict[str, Any]:
        return self.table("config")

    @property
    def verb(self) -> str:
        """From run.json; without it, from a metric that this verb alone has."""
        if self.facts.get("verb"):
            return str(self.facts["verb"])
        guesses = {"frac_reward_zero_std": "grpo", "objective/kl": "ppo", "logps/chosen": "dpo", "margin": "reward"}
        return next((verb for name, verb in guesses.items() if self(name)), "sft")

    @property
    def target_kl(self) -> float | None:
        value = self.config.get("target_kl")
        return float(value) if isinstance(value, int | float) else None

    @cached_property
    def warnings(self) -> list[RunWarning]:
        return warnings(self.lines, self.verb, self.target_kl)

    def table(self, name: str) -> dict[str, Any]:
        """A part of run.json; empty where there is none."""
        part = self.facts.get(name)
        return part if isinstance(part, dict) else {}


def read_record(directory: Path) -> Record:
    lines = [line for line in read_lines(directory / "metrics.jsonl") if "step" in line]
    if not lines:
        raise ValueError(
            f"run must be the output_dir of a run, with its metrics.jsonl, and {directory} "
            + ("has written no line of it yet" if (directory / "metrics.jsonl").exists() else "has none")
        )
    return Record(directory, lines, read_lines(directory / "completions.jsonl"), _facts(directory / "run.json"))


def _facts(path: Path) -> dict[str, Any]:
    """Nothing where there is no such file, or one that a kill left half written."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
