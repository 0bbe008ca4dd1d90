"""A run of `benchmarks/trainers.py` by fastpost: a verb's function, as a user calls it; its log has the split."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from trainers_task import SAMPLED, Job
from trainers_trace import PARTS, Ready, Step, Watch

from fastpost.models.loading import load_model
from fastpost.trainers.config import Dpo, Grpo, Kto, Rloo, Sft
from fastpost.trainers.dpo import dpo
from fastpost.trainers.grpo import grpo
from fastpost.trainers.kto import kto
from fastpost.trainers.log import read_lines
from fastpost.trainers.rloo import rloo
from fastpost.trainers.run import Run
from fastpost.trainers.sft import sft

VERBS = {"sft": (Sft, sft), "dpo": (Dpo, dpo), "kto": (Kto, kto), "grpo": (Grpo, grpo), "rloo": (Rloo, rloo)}


def ready(job: Job, threads: int) -> Ready:
    torch.set_num_threads(threads)
    config_of, verb = VERBS[job.method]
    config = config_of(model=job.model, output_dir=job.out, save_steps=0, **job.fields)
    model, tokenizer = load_model(job.model, dtype="float32")
    given = {"model": model, "processing_class": tokenizer, "train_dataset": list(job.rows)}
    if job.reward is not None:
        given["reward_funcs"] = job.reward

    def train() -> Sequence[Step]:
        watch = Watch()
        watch_updates(watch)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            verb(config, **given)
        lines = read_lines(Path(job.out) / "metrics.jsonl")
        return [_step(job, *each) for each in zip(watch.between(), lines, strict=True)]

    return Ready(train)


def watch_updates(watch: Watch) -> None:
    """A step ends with its update. Of this process, which is a contestant's own."""
    update = Run.update

    def watched(self, *args, **kwargs) -> None:
        update(self, *args, **kwargs)
        watch.end()

    Run.update = watched


def _step(job: Job, seconds: tuple[float, float], line: dict[str, float]) -> Step:
    parts = {name: line[f"step_time/{name}"] for name in PARTS if f"step_time/{name}" in line}
    each = job.fields["per_device_train_batch_size"]
    tokens = line["completions/mean_length"] * each if job.method in SAMPLED else 0.0
    return Step(*seconds, parts, line["loss"], tokens)
