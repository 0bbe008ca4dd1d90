"""What both contestants of `benchmarks/trainers.py` are told: a model, rows in the order of the steps, and the fields
of a config, which are the same for both since fastpost has TRL's names.

sums   the task of `learn_task.py`, a model of 0.2 M parameters, whose held-out score must rise
head   random models of a vocabulary of 32768, where the head is most of the work: a few steps, no score
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from learn_methods import METHODS
from learn_task import write_task

from fastpost.files import read_rows
from fastpost.rewards.builtin import number_match
from fastpost.sums import LONGEST
from fastpost.trainers.loop import order

Fields = Mapping[str, Any]
SAMPLED = ("grpo", "rloo")
COLUMNS = {
    "sft": ("prompt", "completion"),
    "dpo": ("prompt", "chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
    "grpo": ("prompt", "answer"),
    "rloo": ("prompt", "answer"),
}
SAME: Fields = {
    "lr_scheduler_type": "linear",
    "weight_decay": 0.1,
    "adam_beta2": 0.99,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,
    "logging_steps": 1,
}


@dataclass(frozen=True)
class Job:
    """A run, whoever does it."""

    method: str
    model: str  # directory
    rows: Sequence[Mapping[str, Any]]
    out: str  # directory, for the trained model
    fields: Fields
    reward: Callable[..., Any] | None = None

    @property
    def steps(self) -> int:
        return self.fields["max_steps"]

    @property
    def laid_out(self) -> list[dict[str, Any]]:
        """The rows of every step, one step behind the other, as fastpost takes them."""
        each = self.fields["per_device_train_batch_size"] // self.fields.get("num_generations", 1)
        at = order(len(self.rows), self.fields["seed"], 0, each * self.steps)
        return [{name: self.rows[i][name] for name in COLUMNS[self.method]} for i in at]

    def shortened(self, steps: int, out: str) -> Job:
        return replace(self, out=out, fields={**self.fields, "max_steps": steps})


# ---- sums ----

RL = {
    "per_device_train_batch_size": 256,
    "learning_rate": 5e-4,
    "max_steps": 30,
    "temperature": 1.0,
    "max_completion_length": LONGEST,
}
SUMS: Mapping[str, tuple[str, Fields]] = {  # a file of the task, and fields
    "sft": ("demonstrations", {"per_device_train_batch_size": 25, "learning_rate": 3e-3, "max_steps": 300}),
    "dpo": ("pairs", {"per_device_train_batch_size": 32, "learning_rate": 3e-4, "max_steps": 100, "beta": 1.0}),
    "kto": (
        "answers",
        {
            "per_device_train_batch_size": 64,
            "learning_rate": 3e-4,
            "max_steps": 60,
            "beta": 1.0,
            "desirable_weight": 1.5,
        },
    ),
    "grpo": ("prompts", RL | {"num_generations": 8, "beta": 0.0, "epsilon_high": 0.28}),
    "rloo": ("prompts", RL | {"num_generations": 4, "beta": 0.05}),
}


def write_sums(folder: Path, seed: int) -> None:
    """The files of a seed, anew, and the model that all but SFT begin from: that of `learn.py`."""
    shutil.rmtree(folder, ignore_errors=True)
    write_task(folder, seed)
    method = METHODS["sft"]
    method.verb(replace(method.configured(folder, seed, folder / "begun"), save_steps=0))


def sums(method: str, folder: Path, seed: int, out: Path) -> Job:
    """SFT begins from a random model, the others from what a short one left."""
    start = folder / ("base" if method == "sft" else "begun")
    file, fields = SUMS[method]
    reward = number_match if method in SAMPLED else None
    return Job(
        method, str(start), read_rows(folder / f"{file}.jsonl"), str(out), {**SAME, **fields, "seed": seed}, reward
    )


# ---- head ----

HIDDEN, LAYERS, VOCAB = 256, 4, 32768
PROMPT, COMPLETION = 32, 96  # tokens; the shortest has half as many
HEAD: Mapping[str, Fields] = {
    "sft": {"per_device_train_batch_size": 8},
    "dpo": {"per_device_train_batch_size": 4, "beta": 0.1},
    "kto": {"per_device_train_batch_size": 8},
    "grpo": {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": COMPLETION, "beta": 0.0},
    "rloo": {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": COMPLETION, "beta": 0.05},
}
HEAD_STEPS = 5


def write_head(folder: Path, seed: int) -> None:
    from step_trl import tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer(VOCAB).save_pretrained(folder)


def words(draw: random.Random, most: int) -> str:
    return " ".join(str(draw.randrange(2, VOCAB)) for _ in range(draw.randint(most // 2, most)))


def random_row(draw: random.Random) -> dict[str, Any]:
    """With the columns of every method."""
    said = [f" {words(draw, COMPLETION)}" for _ in range(2)]
    columns = {"completion": said[0], "chosen": said[0], "rejected": said[1], "label": draw.random() < 0.5}
    return {"prompt": words(draw, PROMPT), "answer": "", **columns}


def share_of_even(completions: list[str], **_: object) -> list[float]:
    """Of the words, which are numbers."""
    numbers = [[int(word) for word in text.split()] for text in completions]
    return [sum(number % 2 == 0 for number in each) / max(1, len(each)) for each in numbers]


def head(method: str, folder: Path, seed: int, out: Path) -> Job:
    draw = random.Random(seed)
    rows = [random_row(draw) for _ in range(64)]
    fields = {**SAME, "learning_rate": 1e-3, "max_steps": HEAD_STEPS, **HEAD[method], "seed": seed}
    return Job(method, str(folder), rows, str(out), fields, share_of_even if method in SAMPLED else None)
