"""Which sampler a run has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fastpost.models.heads import unwrapped
from fastpost.models.trunk import causal_lm
from fastpost.rollout.continuous import Continuous
from fastpost.rollout.sampler import Generate, Sampler, Tried
from fastpost.rollout.sampling import Sampling

Mode = Literal["colocate", "server"]


@dataclass(frozen=True)
class Backend:
    """TRL's fields and defaults, but for use_transformers_continuous_batching, which is False there."""

    use_vllm: bool = False
    vllm_mode: Mode = "colocate"
    vllm_gpu_memory_utilization: float = 0.3  # colocate: share of the GPU for vLLM's weights and cache
    vllm_max_model_length: int | None = None  # colocate: tokens, prompt and completion; None: the model's positions
    vllm_enable_sleep_mode: bool = False  # colocate: vLLM's memory is free while the model trains
    vllm_server_base_url: str | None = None  # server; None: http://host:port
    vllm_server_host: str = "0.0.0.0"
    vllm_server_port: int = 8000
    vllm_server_timeout: float = 240.0  # seconds
    vllm_group_port: int = 51216
    use_transformers_continuous_batching: bool | None = None  # None: on a GPU where it is the faster one

    def __post_init__(self):
        if self.vllm_mode not in get_args(Mode):
            raise ValueError(f"vllm_mode must be 'colocate' or 'server', got {self.vllm_mode!r}")
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ValueError(
                f"vllm_gpu_memory_utilization must be above 0 and at most 1, got {self.vllm_gpu_memory_utilization}"
            )
        if self.use_vllm and self.use_transformers_continuous_batching:
            raise ValueError("use_vllm and use_transformers_continuous_batching exclude each other: set one of them")

    @property
    def url(self) -> str:
        return self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"


def _vllm(backend: Backend, model: Any, tokenizer: Any, name: str, seed: int) -> Sampler:
    if backend.vllm_mode == "server":
        from fastpost.rollout.server import server

        return server(
            model, tokenizer, backend.url, timeout=backend.vllm_server_timeout, group_port=backend.vllm_group_port
        )
    from fastpost.rollout.vllm import colocated

    return colocated(
        model,
        tokenizer,
        name,
        memory=backend.vllm_gpu_memory_utilization,
        max_model_length=backend.vllm_max_model_length,
        sleeps=backend.vllm_enable_sleep_mode,
        seed=seed,
    )


def sampler_for(
    backend: Backend,
    model: Any,
    tokenizer: Any,
    name: str,  # directory or hub name of the model, or of its adapter's base
    sampling: Sampling,  # of the run
    say: Callable[[str], None],
    batch_size: int = 64,  # completions that `generate` decodes together
) -> Sampler:
    if backend.use_vllm:
        return _vllm(backend, model, tokenizer, name, sampling.seed)
    one_by_one, continuous = Generate(model, tokenizer, batch_size), Continuous(model, tokenizer)
    wanted = backend.use_transformers_continuous_batching
    if wanted is None and causal_lm(unwrapped(model)).device.type == "cuda" and continuous.takes(sampling):
        return Tried({"generate": one_by_one, "continuous batching": continuous}, say)
    return continuous if wanted else one_by_one
