"""What `fastpost plan <verb>` is told: the fields of the run, and what it is to be planned for.

dpo, reward and ppo are planned by their roles: policy, reference, reward, value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastpost.models.attention import NAME
from fastpost.trainers.config import DATA, LOSS, MODEL, PLAN, ROLLOUT, RUN, STEPS, Grpo, Sft, Training
from fastpost.trainers.options import REQUIRED, option

UNREAD = "not read by a plan"


@dataclass(frozen=True, kw_only=True)
class Planned(Training):
    """What every plan is told besides."""

    gpu: int | None = option(
        None, PLAN, "GB of the GPU that the run is to fit on; default: each of 24, 40, 80, 141, 180", above=0
    )
    json: bool = option(False, PLAN, "print JSON in place of a table")
    device: Literal["cuda", "cpu"] = option("cuda", PLAN, "of the run")
    model: str = option(REQUIRED, MODEL, "directory of a Hugging Face causal LM, its config.json alone, or an adapter")
    use_liger_kernel: bool = option(False, MODEL, UNREAD)
    dataset: str = option("", DATA, UNREAD)
    output_dir: str = option("", RUN, UNREAD)

    def __post_init__(self) -> None:
        super().__post_init__()
        how = self.attn_implementation
        if how is not None and how != NAME and "flash" not in how:
            raise ValueError(
                f"attn_implementation {how!r} holds a number for each pair of a pack's tokens, which a plan does not "
                f"count: leave it out, or make it {NAME!r} or one of flash attention"
            )


@dataclass(frozen=True, kw_only=True)
class PlannedSft(Planned, Sft):
    """The memory of supervised fine-tuning, part by part, and what fits on a GPU."""

    max_length: int = option(1024, DATA, "tokens of a row", above=1)


@dataclass(frozen=True, kw_only=True)
class PlannedGrpo(Planned, Grpo):
    """The memory of group-relative policy optimisation, part by part, and what fits on a GPU."""

    reward: tuple[str, ...] = option((UNREAD,), ROLLOUT, UNREAD)
    max_prompt_length: int = option(512, DATA, "tokens of a prompt", above=0)
    rollout_engine: bool = option(False, ROLLOUT, "an engine of its own samples, with a 16-bit copy of the weights")


@dataclass(frozen=True, kw_only=True)
class PlannedPairs(Planned):
    max_length: int = option(1024, DATA, "tokens of a prompt and one of its answers", above=1)
    per_device_train_batch_size: int = option(8, STEPS, "pairs of a microbatch", above=0)


@dataclass(frozen=True, kw_only=True)
class PlannedDpo(PlannedPairs):
    """The memory of direct preference optimisation, part by part, and what fits on a GPU."""


@dataclass(frozen=True, kw_only=True)
class PlannedReward(PlannedPairs):
    """The memory of a reward model's training, part by part, and what fits on a GPU."""


@dataclass(frozen=True, kw_only=True)
class PlannedPpo(Planned):
    """The memory of PPO's four roles, on one base or apart, part by part, and what fits on a GPU."""

    roles: Literal["one base", "separate"] = option(
        "one base", PLAN, "policy, value and reward as adapters on one base; or four models"
    )
    max_prompt_length: int = option(512, DATA, "tokens of a prompt", above=0)
    max_completion_length: int = option(512, ROLLOUT, "tokens, the end-of-sequence token included", above=0)
    generation_batch_size: int = option(256, ROLLOUT, "completions decoded together", above=0)
    rollout_engine: bool = option(False, ROLLOUT, "an engine of its own samples, with a 16-bit copy of the weights")
    beta: float = option(0.05, LOSS, "weight of the KL to the reference; 0: no reference at all", least=0)
