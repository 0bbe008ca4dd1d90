"""Those who watch a run: whoever sits at the terminal, the trackers it reports to, the hub it goes to, and run.json,
which says what the run was."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fastpost.trainers.config import Training
from fastpost.watching.hub import push_to_hub
from fastpost.watching.trackers import open_trackers
from fastpost.watching.view import View

PACKAGES = ("fastpost", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "vllm")


class Audience:
    """Told of steps, lines and samples as they come."""

    def __init__(
        self,
        verb: str,
        config: Training,
        total: int,
        first: int,
        lines: Sequence[Mapping[str, Any]],  # of metrics.jsonl, where the run goes on from a checkpoint
        data: Mapping[str, Any],  # of each split, what became of its rows
    ):
        from fastpost.trainers.log import say

        self._directory, self._config, self._began = Path(config.output_dir), config, time.perf_counter()
        self._facts = {"verb": verb, "config": asdict(config), "data": dict(data), "versions": _versions()}
        self._facts |= {"started": datetime.now(UTC).isoformat(timespec="seconds"), "total_steps": total}
        self._trackers = open_trackers(
            config.report_to,
            self._directory,
            self._facts["config"],
            say,
            project=config.project,
            run_name=config.run_name,
        )
        self._view = View()
        self._view.start(verb, total, first, lines=list(lines), target_kl=getattr(config, "target_kl", None))

    def write(self, **more: Any) -> None:
        """run.json, with what is known now."""
        self._directory.mkdir(parents=True, exist_ok=True)
        aside = self._directory / ".run.json"
        aside.write_text(json.dumps(self._facts | more, indent=2, ensure_ascii=False), encoding="utf-8")
        aside.replace(self._directory / "run.json")

    def step(self, values: Mapping[str, float]) -> None:
        self._view.step(values)

    def line(self, values: Mapping[str, Any], step: int) -> None:
        if not (self._directory / "run.json").exists():  # a run that fails at once leaves nothing
            self.write()
        self._view.line(dict(values))
        self._trackers.log(dict(values), step)

    def sample(self, sample: Mapping[str, Any]) -> None:
        """A line of completions.jsonl."""
        self._view.sample(sample.get("prompt"), sample.get("completion"), sample.get("reward"))

    def close(self) -> None:
        self._view.close()
        self._trackers.finish()

    def finish(self, last: Mapping[str, Any]) -> str | None:
        """The run is over and its model is there; where that went, if it went to the hub."""
        self.write(seconds=round(time.perf_counter() - self._began, 1))
        if not self._config.push_to_hub:
            return None
        name = self._config.hub_model_id or self._directory.resolve().name
        return push_to_hub(self._directory, name, self._facts, dict(last), private=self._config.hub_private_repo)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
