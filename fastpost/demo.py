"""`fastpost demo`: a random model of 0.2 million parameters learns to add, by the verbs that a user calls.

The task is that of `fastpost.sums`. A few demonstrations teach the procedure and leave holes in the addition table.
GRPO is then given many problems with nothing but their answers, and fills the holes. The control spends GRPO's time on
more SFT on the same demonstrations. Every accuracy is greedy, on held-out problems whose numbers occur in no
demonstration and no prompt.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch

from fastpost.data import check_columns, prompts
from fastpost.files import read_rows
from fastpost.models.loading import load_model
from fastpost.rewards import load_reward
from fastpost.rollout import Sampling
from fastpost.rollout.sampler import Generate
from fastpost.sums import LONGEST, problem, terms, write_model
from fastpost.trainers.config import Demo, Grpo, Sft
from fastpost.trainers.grpo import grpo
from fastpost.trainers.log import append, read_lines, say
from fastpost.trainers.loop import peak_memory_mb
from fastpost.trainers.rollouts import greedy_reward
from fastpost.trainers.sft import sft
from fastpost.trainers.task import Task

DEMONSTRATIONS, PROMPTS, VALIDATION, TEST = 250, 2000, 200, 300  # problems of each file
ROUND, RISE, PATIENCE = 100, 0.02, 2  # SFT steps between validations; it stops after so many without such a rise
GRPO_STEPS = 120
REWARD = "number_match"


def demo(config: Demo) -> None:
    """Runs the whole of it and prints a table, then one line of JSON."""
    run = _run_dir(config)
    torch.set_num_threads(1)  # matrices this small lose more to the threads' meeting than they gain
    write_task(run, config.seed)
    began = time.perf_counter()
    stages = [Stage("base", run / "base", 0, 0.0, accuracy(run / "base", run / "test.jsonl"))]
    stages.append(_sft_until_it_stops_rising(run, config.seed))
    stages.append(_grpo(run, config.seed, stages[1]))
    seconds, peak = time.perf_counter() - began, peak_memory_mb()
    if config.control:
        stages.append(_control(run, config.seed, stages[1], stages[2].seconds))
    plot(run, stages)
    print_table(stages)
    result = {f"accuracy_{stage.name}": stage.accuracy for stage in stages}
    print(json.dumps(result | {"seconds": round(seconds, 1), "peak_mb": round(peak), "run_dir": str(run)}))


def _run_dir(config: Demo) -> Path:
    """The directory that was asked for, if it is empty, or a new one."""
    if config.output_dir is None:
        names = (Path("runs") / f"demo-{config.seed}{f'-{i}' if i > 1 else ''}" for i in count(1))
        return next(name for name in names if not name.exists())
    run = Path(config.output_dir)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ValueError(f"output_dir {config.output_dir} must be empty or not exist yet")
    return run


# ---- the task ----


def problems(seed: int) -> dict[str, list[dict[str, str]]]:
    """The rows of every file. No pair of numbers occurs twice, and training and held-out files share no number."""
    draw = random.Random(seed)
    train, test = terms(draw, DEMONSTRATIONS + PROMPTS, VALIDATION + TEST)
    pairs = {
        "demonstrations": train[:DEMONSTRATIONS],
        "prompts": train[DEMONSTRATIONS:],
        "validation": test[:VALIDATION],
        "test": test[VALIDATION:],
    }
    rows = {name: [problem(a, b, draw) for a, b in some] for name, some in pairs.items()}
    without = [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows["prompts"]]
    return rows | {"prompts": without}


def write_task(run: Path, seed: int) -> None:
    """base/, a random model with its tokenizer, and a JSONL file for each set of problems."""
    rows = problems(seed)
    for name, some in rows.items():
        append(run / f"{name}.jsonl", some)
    write_model(run / "base", [row["prompt"] + row["completion"] for row in rows["demonstrations"]], seed)


# ---- the stages ----


@dataclass(frozen=True)
class Stage:
    """A model and how it was come by."""

    name: str
    model: Path
    steps: int
    seconds: float  # of training
    accuracy: float  # on test.jsonl


def accuracy(model_dir: Path, dataset: Path, reward: str = REWARD, longest: int = LONGEST) -> float:
    """Share of right greedy answers, which have a reward of 1 and at most so many tokens."""
    rows = read_rows(dataset)
    check_columns(rows, "grpo", dataset)
    model, tokenizer = load_model(model_dir, dtype="float32")
    sampler = Generate(model, tokenizer, batch_size=256)
    task = Task(sampler, tokenizer, [load_reward(reward)], None, Sampling(max_completion_length=longest))
    return round(greedy_reward(task, prompts(rows, tokenizer, None)), 4)


def _sft_config(run: Path, seed: int) -> Sft:
    return Sft(
        model=str(run / "base"),
        dataset=str(run / "demonstrations.jsonl"),
        output_dir=str(run / "sft"),
        seed=seed,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        warmup_steps=20,
        weight_decay=0.1,
        adam_beta2=0.99,
        per_device_train_batch_size=50,
        gradient_checkpointing=False,
        max_steps=ROUND,
        save_steps=ROUND,
    )


def _sft_until_it_stops_rising(run: Path, seed: int) -> Stage:
    """Rounds of SFT, each resumed from the last, until PATIENCE of them bring no rise; keeps the best before those."""
    config, spent, curve, best = _sft_config(run, seed), 0.0, [], 0
    while len(curve) <= best + PATIENCE:
        steps = ROUND * (len(curve) + 1)
        began = time.perf_counter()
        sft(replace(config, max_steps=steps, resume_from_checkpoint="latest" if curve else None))
        spent += time.perf_counter() - began
        curve.append(accuracy(run / "sft" / f"checkpoint-{steps}", run / "validation.jsonl"))
        best = len(curve) - 1 if curve[-1] >= curve[best] + RISE else best
        append(run / "validation_curve.jsonl", [{"step": steps, "accuracy": curve[-1]}])
        say(f"sft: {steps} steps, {curve[-1]:.1%} of the validation problems right")
    steps = ROUND * (best + 1)
    model = run / "sft" / f"checkpoint-{steps}"
    return Stage("sft", model, steps, spent * steps / (ROUND * len(curve)), accuracy(model, run / "test.jsonl"))


def _grpo(run: Path, seed: int, begun: Stage) -> Stage:
    """GRPO on answers alone, from the SFT model."""
    config = Grpo(
        model=str(begun.model),
        dataset=str(run / "prompts.jsonl"),
        output_dir=str(run / "grpo"),
        reward=(REWARD,),
        seed=seed,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        warmup_steps=10,
        weight_decay=0.1,
        adam_beta2=0.99,
        per_device_train_batch_size=512,
        generation_batch_size=512,
        max_completion_length=LONGEST,
        epsilon_high=0.28,
        gradient_checkpointing=False,
        max_steps=GRPO_STEPS,
        save_steps=0,
        logging_steps=5,
    )
    began = time.perf_counter()
    grpo(config)
    seconds = time.perf_counter() - began
    return Stage("grpo", run / "grpo", config.max_steps, seconds, accuracy(run / "grpo", run / "test.jsonl"))


def _control(run: Path, seed: int, begun: Stage, seconds: float) -> Stage:
    """As many more steps of SFT, from the same model, as take GRPO's time."""
    more = max(1, round(seconds * begun.steps / begun.seconds))
    config = replace(
        _sft_config(run, seed),
        output_dir=str(run / "control"),
        max_steps=begun.steps + more,
        save_steps=0,
        resume_from_checkpoint=str(begun.model),
    )
    began = time.perf_counter()
    sft(config)
    seconds = time.perf_counter() - began
    return Stage("control", run / "control", more, seconds, accuracy(run / "control", run / "test.jsonl"))


# ---- the report ----

TITLES = {
    "base": "random model",
    "sft": f"SFT on {DEMONSTRATIONS} demonstrations",
    "grpo": f"then GRPO on {PROMPTS} answers",
    "control": "instead of GRPO, more SFT",
}


def print_table(stages: list[Stage]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Greedy accuracy on {TEST} held-out problems")
    for column in ("stage", "steps", "seconds", "accuracy"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in stages:
        table.add_row(TITLES[stage.name], str(stage.steps), f"{stage.seconds:.0f}", f"{stage.accuracy:.1%}")
    Console().print(table)


def plot(run: Path, stages: list[Stage]) -> None:
    """demo.png: validation accuracy during SFT, reward during GRPO, and the test accuracy of every stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    curves = (
        (left, "SFT: held-out accuracy", run / "validation_curve.jsonl", "accuracy"),
        (middle, "GRPO: reward in training", run / "grpo" / "metrics.jsonl", "reward"),
    )
    for axes, title, path, name in curves:
        lines = read_lines(path)
        axes.plot([line["step"] for line in lines], [line[name] for line in lines], marker=".")
        axes.set(title=title, xlabel="optimizer step", ylim=(0, 1))
        axes.grid(alpha=0.3)
    bars = right.bar([stage.name for stage in stages], [stage.accuracy for stage in stages])
    right.bar_label(bars, fmt="{:.0%}")
    right.set(title="test accuracy")
    figure.savefig(run / "demo.png", dpi=110)
