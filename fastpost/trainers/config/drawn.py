"""How completions are drawn, by which engine, and how they are judged: parts of the configs that sample."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from fastpost.rollout import Sampling
from fastpost.rollout.backends import Backend
from fastpost.trainers.config.groups import ENGINE, ROLLOUT
from fastpost.trainers.options import option


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """How completions are drawn."""

    max_completion_length: int = option(512, ROLLOUT, "tokens, the end-of-sequence token included", above=0)
    temperature: float = option(1.0, ROLLOUT, "of sampling, and of the policy that is trained", above=0)
    top_p: float = option(1.0, ROLLOUT, "sample from the smallest set of this probability", above=0, most=1)
    top_k: int = option(0, ROLLOUT, "sample from this many tokens; 0: from all", least=0)
    min_p: float | None = option(None, ROLLOUT, "drop tokens below this share of the likeliest", least=0, most=1)
    repetition_penalty: float = option(1.0, ROLLOUT, "of tokens that are there already; 1: none", above=0)
    stop: tuple[str, ...] = option((), ROLLOUT, "texts that end a completion; repeatable")
    generation_batch_size: int = option(
        256,
        ROLLOUT,
        "completions decoded together, for speed alone (TRL: those of a round, of one step or more)",
        above=0,
    )

    def sampling(self, seed: int = 0) -> Sampling:
        return Sampling(
            self.temperature,
            self.top_p,
            self.top_k,
            self.min_p,
            self.max_completion_length,
            seed,
            self.repetition_penalty,
            self.stop,
        )


@dataclass(frozen=True, kw_only=True)
class Engined(Drawn):
    """And by what."""

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
        None, ENGINE, "transformers' paged generation; default: on a GPU, if it is faster than generate (TRL: false)"
    )

    @property
    def backend(self) -> Backend:
        """Which sampler, and how it is reached."""
        return Backend(**{f.name: getattr(self, f.name) for f in fields(Backend)})


@dataclass(frozen=True, kw_only=True)
class Rewarded:
    """How they are judged."""

    reward: tuple[str, ...] = option(
        (), ROLLOUT, "built-in names, file.py:function, a reward model's directory, judge.yaml; repeatable", needed=True
    )
    reward_weights: tuple[float, ...] | None = option(None, ROLLOUT, "one for each reward; default: 1")
    reward_timeout: float = option(600.0, ROLLOUT, "seconds that a reward function may take for a batch", above=0)
