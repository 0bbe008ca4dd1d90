"""Of all verbs whose policy samples, and is told how good that was."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from fastpost.rollout.backends import Backend
from fastpost.trainers.config.training import DATA, ENGINE, ROLLOUT, STEPS, Training
from fastpost.trainers.options import option


@dataclass(frozen=True, kw_only=True)
class Sampled(Training):
    """What these verbs are told besides."""

    learning_rate: float = option(1e-6, STEPS, "peak of the schedule", least=0)
    max_prompt_length: int | None = option(None, DATA, "tokens; rows with a longer prompt are left out", above=0)

    reward: tuple[str, ...] = option((), ROLLOUT, "built-in names or file.py:function; repeatable", needed=True)
    reward_weights: tuple[float, ...] | None = option(None, ROLLOUT, "one for each reward; default: 1")
    num_generations: int = option(1, ROLLOUT, "completions of a prompt, a group", least=1)
    max_completion_length: int = option(512, ROLLOUT, "tokens, the end-of-sequence token included", above=0)
    mask_truncated_completions: bool = option(False, ROLLOUT, "leave completions that did not end out of the loss")
    soft_punish_cache: int | None = option(
        None,
        ROLLOUT,
        "take up to 1 from the reward of a completion by how far it is into the last so many tokens of "
        "max_completion_length (DAPO's soft overlong punishment)",
        least=0,
    )
    missing_eos_penalty: float | None = option(
        None, ROLLOUT, "taken from the reward of a completion that did not end", above=0
    )
    temperature: float = option(1.0, ROLLOUT, "of sampling, and of the policy that is trained", above=0)
    top_p: float = option(1.0, ROLLOUT, "sample from the smallest set of this probability", above=0, most=1)
    top_k: int = option(0, ROLLOUT, "sample from this many tokens; 0: from all", least=0)
    min_p: float | None = option(None, ROLLOUT, "drop tokens below this share of the likeliest", least=0, most=1)
    repetition_penalty: float = option(1.0, ROLLOUT, "of tokens that are there already; 1: none", above=0)
    stop: tuple[str, ...] = option((), ROLLOUT, "texts that end a completion; repeatable")
    generation_batch_size: int = option(256, ROLLOUT, "completions decoded together", above=0)

    reward_timeout: float = option(600.0, ROLLOUT, "seconds that a reward function may take for a batch", above=0)

    use_vllm: bool = option(False, ENGINE, "sample by vLLM, which must be installed; not run on a GPU yet")
    vllm_mode: Literal["colocate", "server"] = option("colocate", ENGINE, "vLLM in this process, or trl vllm-serve")
    vllm_gpu_memory_utilization: float = option(0.3, ENGINE, "colocate: share of the GPU for it", above=0, most=1)
    vllm_max_model_length: int | None = option(None, ENGINE, "colocate: tokens of prompt and completion", above=0)
    vllm_enable_sleep_mode: bool = option(False, ENGINE, "colocate: its memory is free while the model trains")
    vllm_server_base_url: str | None = option(None, ENGINE, "server: default: http://host:port")
    vllm_server_host: str = option("0.0.0.0", ENGINE, "server")
    vllm_server_port: int = option(8000, ENGINE, "server", above=0)
    vllm_server_timeout: float = option(240.0, ENGINE, "server: seconds to wait for it", above=0)
    vllm_group_port: int = option(51216, ENGINE, "server: of the channel for weights", above=0)
    use_transformers_continuous_batching: bool | None = option(
        None, ENGINE, "transformers' paged generation; default: on a GPU, if it is faster than generate"
    )

    updates_field: ClassVar[str] = ""  # the field that multiplies optimizer steps on the same rollouts

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self)
        self.backend  # noqa: B018  # what does not go together is refused there
        if self.max_steps > 0 and self.max_steps % self.updates_per_round:
            above = self.max_steps + -self.max_steps % self.updates_per_round
            raise ValueError(
                f"max_steps must be a multiple of {self.updates_field} {self.updates_per_round}, so that the last "
                f"rollouts are used up: got {self.max_steps}, try {above}"
            )

    @property
    def updates_per_round(self) -> int:
        """Optimizer steps on the same rollouts; files are written between rollouts."""
        return 1

    @property
    def backend(self) -> Backend:
        """Which sampler, and how it is reached."""
        return Backend(**{f.name: getattr(self, f.name) for f in fields(Backend)})

    @property
    def rows_per_round(self) -> int:
        """Completions that are sampled together, a process."""
        return self.rows_per_step


def check_groups(config: Sampled) -> None:
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
