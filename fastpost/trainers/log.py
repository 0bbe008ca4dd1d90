"""What a run says while it runs: lines of metrics.jsonl, each a mean over some steps."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpost.trainers.loop import peak_memory_mb

if TYPE_CHECKING:
    from fastpost.trainers.audience import Audience


def say(text: str) -> None:
    """A line for the user, from the first of the processes; stdout is left to results."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


class Log:
    """Means of what the steps add, written to metrics.jsonl by `write`; one that is not `heard` writes nothing.
    `pending`: what the steps before `start` gave to a line that is not written yet; a checkpoint has it."""

    def __init__(
        self,
        directory: Path,
        start: int,
        num_tokens: int,
        pending: Mapping[str, Sequence[float]],
        audience: Audience | None = None,
        heard: bool = True,
    ):
        self.path, self.heard = directory / "metrics.jsonl", heard
        for path in (self.path, directory / "completions.jsonl") if heard else ():
            keep_until(path, start)
        self.num_tokens = self._written = num_tokens
        self._audience = audience
        self._since = time.perf_counter()
        self.pending = {name: list(values) for name, values in pending.items()}
        self._episode: int | None = None
        self._told = 0  # of the episodes

    def tally(self, episode: int) -> None:
        """So many completions were sampled by now, those before a resume as well: from the first call on lines have
        episode, eps (a second) and lr, as those of TRL's old PPOTrainer."""
        if self._episode is None:
            self._told = episode
        self._episode = episode

    def add(self, values: Mapping[str, float], tokens: int) -> None:
        """One step's values, and how many tokens the model read in it."""
        self.num_tokens += tokens
        self.note(values)
        if self._audience is not None:
            self._audience.step(values)

    def note(self, values: Mapping[str, float]) -> None:
        """Values for the next line that are no step's own."""
        for name, value in values.items():
            self.pending.setdefault(name, []).append(value)

    def write(self, step: int, epoch: float) -> None:
        """A line of the means since the last one."""
        now = time.perf_counter()
        line = {"step": step, "epoch": round(epoch, 4)}
        line |= {name: _mean(values) for name, values in self.pending.items()}
        line["num_tokens"] = self.num_tokens
        line["tokens_per_second"] = round((self.num_tokens - self._written) / (now - self._since), 1)
        line["peak_memory_mb"] = round(peak_memory_mb(), 1)
        if self._episode is not None:
            line |= {"episode": self._episode, "lr": line["learning_rate"]}
            line["eps"] = round((self._episode - self._told) / (now - self._since), 2)
            self._told = self._episode
        if self.heard:
            append(self.path, [line])
        if self._audience is not None:
            self._audience.line(line, step)
        self._since, self._written, self.pending = now, self.num_tokens, {}


def _mean(values: list[float]) -> float | None:
    """JSON has no NaN: the mean of the numbers among the values, null if there are none."""
    numbers = [value for value in values if math.isfinite(value)]
    return sum(numbers) / len(numbers) if numbers else None


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines to a JSONL file. Its directory comes into being with it: a run that fails at once leaves nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file that we wrote; one cut off by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def written_until(directory: Path, step: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that a run which goes on after `step` has behind it."""
    return [line for line in read_lines(directory / "metrics.jsonl") if line["step"] <= step]


def keep_until(path: Path, step: int) -> None:
    """Drops lines after `step`: a run resumed there writes them again."""
    if path.exists():
        aside = path.with_name(f".{path.name}")
        aside.unlink(missing_ok=True)
        append(aside, [line for line in read_lines(path) if line["step"] <= step])
        os.replace(aside, path)
