"""checkpoint-N: the model after N steps, the optimizer's moments, and the little that (seed, N) does not already say.

Tensors are safetensors, the rest JSON, and `files.json` has what each file must hash to. A checkpoint is written aside
and renamed, so it is whole or absent; one that a disk has spoilt since is known by its hashes, and passed over.
N steps straight and k steps, then a resume to N, give the same bits on a CPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastpost.models.saving import written_aside
from fastpost.trainers.config import Training
from fastpost.trainers.log import say
from fastpost.trainers.optimizers import state_tensors

if TYPE_CHECKING:
    from fastpost.trainers.start import Start

# Fields that may differ on resume without a word: they do not change what is computed in a step.
FREE = {"output_dir", "resume_from_checkpoint", "eval_dataset", "metric_for_best_model", "greater_is_better"}
FREE |= {"logging_steps", "eval_steps", "save_steps", "save_total_limit"}
FREE |= {"report_to", "project", "run_name", "push_to_hub", "hub_model_id", "hub_private_repo"}
STATE, OPTIMIZER, HASHES = "state.json", "optimizer.safetensors", "files.json"


@dataclasses.dataclass(frozen=True)
class State:
    """What a run knows at the end of a step, besides tensors."""

    step: int = 0
    rows: int = 0  # taken from the endless row of epochs
    num_tokens: int = 0
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)  # a verb's own, in JSON: a controller, a mean
    best: dict[str, float] | None = None  # {"step": ..., "value": ...} of metric_for_best_model
    extra: int = 0  # of the rows, those that rounds took besides their own
    pending: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # of the log's next line
    examples: int = 0  # that there were to train on; 0: it was not noted


# ---- writing ----


def save(config: Training, start: Start, state: State) -> None:
    """Writes checkpoint-<step>, then removes the oldest beyond save_total_limit, but not the best. The first of the
    processes does, with what it gathers from all."""
    moments = state_tensors(start.optimizer, start.world.first)
    with start.world.on_host():
        if start.world.first:
            _write(config, start, state, moments)
    start.world.wait()


def _write(config: Training, start: Start, state: State, moments: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    output = Path(config.output_dir)
    path = output / f"checkpoint-{state.step}"
    try:
        with written_aside(path) as aside:
            start.save_model(aside)
            save_file(moments, aside / OPTIMIZER)
            _write_json(aside / STATE, dataclasses.asdict(state) | {"config": plain(config)})
            _write_json(aside / HASHES, {str(file.relative_to(aside)): _hash(file) for file in _files(aside)})
    except (OSError, SafetensorError) as error:
        before = checkpoints(output)
        rest = f"the run can go on from {before[-1]}" if before else "there is none before it"
        raise ValueError(f"{path} could not be written: {error}; {rest}") from error
    best = None if state.best is None else int(state.best["step"])
    for old in checkpoints(output)[: -config.save_total_limit] if config.save_total_limit else ():
        if _step_of(old) != best:
            shutil.rmtree(old)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != HASHES)


def _hash(file: Path) -> str:
    with file.open("rb") as bytes_:
        return hashlib.file_digest(bytes_, "sha256").hexdigest()


def plain(config: Training) -> dict[str, Any]:
    """What decides what a step computes, the verb and fields, as JSON gives them back."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    return json.loads(json.dumps({"verb": type(config).__name__.lower()} | fields))


def fingerprint(config: Training) -> str:
    """The same for runs whose steps compute the same."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()


# ---- finding ----


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step_of)


def oldest(output: Path) -> int:
    """The step of the first checkpoint; 0 where there is none."""
    return min(map(_step_of, checkpoints(output)), default=0)


def find(config: Training) -> Path | None:
    """The checkpoint to resume from; None: there is none, or none is asked for."""
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted != "latest":
        fault = spoilt(Path(wanted))
        if fault:
            raise ValueError(f"resume_from_checkpoint {wanted!r} {fault}")
        return Path(wanted)
    for path in reversed(checkpoints(Path(config.output_dir))):
        fault = spoilt(path)
        if not fault:
            return path
        say(f"{path} {fault}: it is passed over, the one before is taken")
    say(f"output_dir {config.output_dir} holds no checkpoint to resume from: the run begins at step 0")
    return None


def spoilt(path: Path) -> str | None:
    """What is wrong with a checkpoint, as the rest of a sentence that begins with its name."""
    if not (path / STATE).is_file():
        return f"is no checkpoint: it has no {STATE}"
    try:
        hashes = json.loads((path / HASHES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"is spoilt: {HASHES} cannot be read ({error})"
    for name, wanted in hashes.items():
        if not (path / name).is_file():
            return f"is spoilt: {name} is missing"
        if _hash(path / name) != wanted:
            return f"is spoilt: {name} is not what was written"
    return None


def read_state(path: Path) -> tuple[State, dict[str, Any]]:
    """What `save` wrote, and the config of then."""
    facts = json.loads((path / STATE).read_text(encoding="utf-8"))
    config = facts.pop("config")
    return State(**facts), config


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


# ---- the directory of a run ----


def check_output_dir(config: Training) -> None:
    """A new run must not mix its files with those of an old one."""
    output = Path(config.output_dir)
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"output_dir {config.output_dir} cannot be made: {there} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"output_dir {config.output_dir} cannot be written: no permission in {there}")
    if config.resume_from_checkpoint is not None:
        return
    finished = any((output / name).exists() for name in ("config.json", "adapter_config.json"))
    if not finished and not checkpoints(output) and (output / "metrics.jsonl").exists():
        say(f"output_dir {config.output_dir} holds a run that left no checkpoint: it is begun again")
    elif (output / "metrics.jsonl").exists() or checkpoints(output):
        raise ValueError(
            f"output_dir {config.output_dir} holds a run already: continue it with --resume_from_checkpoint latest, "
            "or choose another output_dir"
        )


def clear(output: Path) -> None:
    """Removes what a killed process had begun to write: in the directory of the run, and of it, beside it."""
    begun = [(output, r"checkpoint-\d+|rollouts"), (output.absolute().parent, re.escape(output.name))]
    for directory, names in begun:
        for path in directory.glob(".*") if directory.is_dir() else ():
            if path.is_dir() and re.fullmatch(rf"\.({names})\.\d+", path.name):
                shutil.rmtree(path, ignore_errors=True)


def set_later_aside(output: Path, step: int) -> None:
    """Renames the checkpoints after `step`: a run resumed there goes another way, and has the later numbers itself.

    Left among its own, they would be the 'latest' ones, and outlive those that it writes by save_total_limit.
    """
    for path in checkpoints(output):
        if _step_of(path) > step:
            names = (path.with_name(f"{path.name}.abandoned-{i}") for i in count(1))
            aside = next(name for name in names if not name.exists())
            path.rename(aside)
            say(f"resuming before {path}: it is now {aside.name}, and counts no more")
