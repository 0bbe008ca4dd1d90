"""Of the verb that learns from pairs of its own completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastpost.trainers.config.groups import MODEL, ROLLOUT, STEPS
from fastpost.trainers.config.preference import Contrasted
from fastpost.trainers.config.sampled import Sampled
from fastpost.trainers.options import option


@dataclass(frozen=True, kw_only=True)
class OnlineDpo(Sampled, Contrasted):
    """DPO on pairs that the policy samples as it trains, and rewards tell apart. arXiv:2402.04792"""

    ref_model: str | None = option(None, MODEL, "directory of another reference; default: the model as it was")
    reward: tuple[str, ...] = option(
        (),
        ROLLOUT,
        "built-in names, file.py:function, a reward model's directory, judge.yaml as one who scores; repeatable; "
        "beside a judge or in its place",
    )
    judge: str | None = option(
        None, ROLLOUT, "YAML file of a judge, or of several, who compares the two completions of a prompt (TRL's judge)"
    )
    num_generations: int = option(
        2, ROLLOUT, "completions of a prompt, of which the best and the worst are its pair", least=2
    )
    max_completion_length: int = option(64, ROLLOUT, "tokens, the end-of-sequence token included", above=0)
    temperature: float = option(0.9, ROLLOUT, "of sampling; log-probabilities are those at 1", above=0)
    learning_rate: float = option(5e-7, STEPS, "peak of the schedule", least=0)
    per_device_train_batch_size: int = option(8, STEPS, "prompts of a microbatch, each a pair", above=0)
    disable_dropout: bool = option(True, STEPS, "the model's own is off; adapters have what lora_dropout says")

    rows_are_completions: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_losses()

    @property
    def rows_per_round(self) -> int:
        return self.rows_per_step * self.num_generations
