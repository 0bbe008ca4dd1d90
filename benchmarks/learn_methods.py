"""The methods of `benchmarks/learn.py`, each with the fields of its verb; those of no method are in SAME.

The starts of RL and of preferences are what a few demonstrations give; PPO, GRPO and their kin have 256 completions a
round, and one reward, whether the answer is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from learn_task import right_answers, right_order

from fastpost.sums import LONGEST
from fastpost.trainers.config import Distill, Dpo, Grpo, Kto, Ppo, Reinforce, Reward, Rloo, Sft, Training
from fastpost.trainers.distill import distill
from fastpost.trainers.dpo import dpo
from fastpost.trainers.grpo import grpo
from fastpost.trainers.kto import kto
from fastpost.trainers.ppo import ppo
from fastpost.trainers.reinforce import reinforce
from fastpost.trainers.reward import reward
from fastpost.trainers.rloo import rloo
from fastpost.trainers.sft import sft

Score = Callable[[Path, Path], float]  # (directory of a model, folder of the task)

SAME: Mapping[str, Any] = {
    "warmup_steps": 5,
    "weight_decay": 0.1,
    "adam_beta2": 0.99,
    "gradient_checkpointing": False,
    "logging_steps": 5,
}
RL: Mapping[str, Any] = {
    "reward": ("number_match",),
    "temperature": 1.0,
    "max_completion_length": LONGEST,
    "per_device_train_batch_size": 256,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "max_steps": 60,
}


@dataclass(frozen=True)
class Method:
    """A verb, what it is told, and what becomes of the model that it is given."""

    verb: Callable[..., Any]
    config: type[Training]
    dataset: str  # a file of the task
    fields: Mapping[str, Any] = field(default_factory=dict)
    begins: str = "sft"  # the method whose model it begins from, or a random model
    models: Mapping[str, str] = field(default_factory=dict)  # further fields that are the model of a method
    points: int = 5  # how often it is scored on the way
    score: Score = right_answers
    must_learn: bool = True

    @property
    def wants(self) -> list[str]:
        """The methods whose models it needs."""
        return [name for name in (self.begins, *self.models.values()) if name in METHODS]

    def configured(self, folder: Path, seed: int, out: Path) -> Any:
        return self.config(
            model=str(folder / self.begins),
            dataset=str(folder / f"{self.dataset}.jsonl"),
            output_dir=str(out),
            seed=seed,
            save_steps=self.fields["max_steps"] // self.points,
            **{name: str(folder / other) for name, other in self.models.items()},
            **{**SAME, **self.fields},
        )


DEMONSTRATED = {"per_device_train_batch_size": 25, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
COMPARED = {"per_device_train_batch_size": 32, "learning_rate": 3e-4, "max_steps": 120}
ANSWERED = {"per_device_train_batch_size": 64, "beta": 1.0, "desirable_weight": 1.5}
PPO = {
    "per_device_train_batch_size": 128,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "vf_coef": 1.0,
    "kl_coef": 0.0,
    "max_steps": 120,
}
TAUGHT = {"per_device_train_batch_size": 50, "learning_rate": 2e-3}
ON_POLICY = {"max_completion_length": LONGEST, "per_device_train_batch_size": 64, "learning_rate": 1e-3}

METHODS: Mapping[str, Method] = {
    "sft": Method(sft, Sft, "demonstrations", DEMONSTRATED | {"max_steps": 300}, begins="base"),
    "more sft": Method(sft, Sft, "demonstrations", DEMONSTRATED | {"max_steps": 200}, must_learn=False),
    "teacher": Method(sft, Sft, "lessons", TAUGHT | {"max_steps": 400}, begins="large"),
    "dpo": Method(dpo, Dpo, "pairs", COMPARED | {"beta": 1.0, "max_steps": 200}),
    "kto": Method(kto, Kto, "answers", COMPARED | ANSWERED),
    "reward": Method(
        reward, Reward, "preferences", COMPARED | {"learning_rate": 1e-3, "max_steps": 200}, score=right_order
    ),
    "grpo": Method(grpo, Grpo, "prompts", RL | {"num_iterations": 2, "epsilon_high": 0.28, "max_steps": 120}),
    "rloo": Method(rloo, Rloo, "prompts", RL | {"num_iterations": 2, "num_generations": 4, "beta": 0.0}),
    "reinforce": Method(reinforce, Reinforce, "prompts", RL | {"num_iterations": 2, "kl_coef": 0.0}),
    "ppo": Method(ppo, Ppo, "prompts", RL | PPO),
    "distill": Method(distill, Distill, "prompts", ON_POLICY | {"max_steps": 100}, models={"teacher_model": "teacher"}),
}
