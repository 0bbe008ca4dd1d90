"""Of verbs whose policy samples, and is told how good that was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastpost.trainers.config.training import DATA, LOSS, ROLLOUT, STEPS, Training
from fastpost.trainers.options import option


@dataclass(frozen=True, kw_only=True)
class Grpo(Training):
    """Group-relative policy optimisation on rewards that a function computes. arXiv:2402.03300"""

    learning_rate: float = option(1e-6, STEPS, "peak of the schedule", least=0)
    share_prompts: bool | None = option(
        None, STEPS, "completions in one microbatch have their common prompt once; default: on a CPU, if attention can"
    )

    max_prompt_length: int | None = option(None, DATA, "tokens; rows with a longer prompt are left out", above=0)

    reward: tuple[str, ...] = option((), ROLLOUT, "built-in names or file.py:function; repeatable", needed=True)
    reward_weights: tuple[float, ...] | None = option(None, ROLLOUT, "one for each reward; default: 1")
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", ROLLOUT, "whose standard deviation divides the advantages"
    )
    num_generations: int = option(8, ROLLOUT, "completions of a prompt, a group", least=2)
    max_completion_length: int = option(512, ROLLOUT, "tokens, the end-of-sequence token included", above=0)
    mask_truncated_completions: bool = option(False, ROLLOUT, "leave completions that did not end out of the loss")
    temperature: float = option(1.0, ROLLOUT, "of sampling, and of the policy that is trained", above=0)
    top_p: float = option(1.0, ROLLOUT, "sample from the smallest set of this probability", above=0, most=1)
    top_k: int = option(0, ROLLOUT, "sample from this many tokens; 0: from all", least=0)
    min_p: float | None = option(None, ROLLOUT, "drop tokens below this share of the likeliest", least=0, most=1)
    generation_batch_size: int = option(256, ROLLOUT, "completions decoded together", above=0)

    beta: float = option(0.0, LOSS, "weight of the KL (k3) to the model as it was; 0: no reference at all", least=0)
    epsilon: float = option(0.2, LOSS, "ratios are clipped below 1 - epsilon (GSPO's paper: 3e-4)", least=0, most=1)
    epsilon_high: float | None = option(None, LOSS, "and above 1 + epsilon_high; default: epsilon", least=0)
    importance_sampling_level: Literal["token", "sequence"] = option(
        "token", LOSS, "of the ratios: token is GRPO's, sequence GSPO's"
    )
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = option(
        "dapo", LOSS, "what a step averages over: its tokens; within then over completions; max_completion_length each"
    )
    num_iterations: int = option(
        1, LOSS, "optimizer steps on the same rollouts; files are written between rollouts", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self)
        if self.max_steps > 0 and self.max_steps % self.num_iterations:
            raise ValueError(
                f"max_steps must be a multiple of num_iterations {self.num_iterations}, so that the last rollouts are "
                f"used up: got {self.max_steps}, try {self.max_steps + -self.max_steps % self.num_iterations}"
            )


def check_groups(config: Grpo) -> None:
    """A step must hold whole groups, and several microbatches must not each hold a part of one."""
    rows, group = config.rows_per_step, config.num_generations
    if rows % group:
        below, above = rows - rows % group, rows + -rows % group
        sizes = " or ".join(str(size) for size in (below, above) if size)
        divisors = [d for d in range(2, rows + 1) if rows % d == 0]
        fits = f"; or num_generations {', '.join(map(str, divisors))}" if divisors else ""
        raise ValueError(
            f"per_device_train_batch_size {config.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{config.gradient_accumulation_steps} = {rows} completions a step must be a multiple of num_generations "
            f"{group}: make it {sizes}{fits}"
        )
