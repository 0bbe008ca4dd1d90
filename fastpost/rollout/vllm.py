"""Sampling by a vLLM that shares this process and its GPU: it sleeps while the model trains.

  sleep      frees the cache, and the weights: to the host under an adapter, whose base stays as it is (level 1), or
             altogether where all of them are new each time (level 2)
  rollout    wake weights -> weights or adapter of this step -> forget cached prefixes -> wake cache -> sample -> sleep

Written from vLLM's documentation (0.22 to 0.31) and not yet run on a GPU: its tests have a double in vLLM's place.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastpost.models.qlora import is_quantised
from fastpost.rollout import engine
from fastpost.rollout.request import request
from fastpost.rollout.sampling import Completion, Sampling


@dataclass
class Colocated:
    """A `Sampler`. It has the weights of the first call after `update`, or of each call where sleep drops them."""

    llm: Any  # vllm.LLM
    model: Any
    tokenizer: Any
    sleeps: bool = False
    stale: bool = True
    version: int = 0  # of the adapter
    adapter: Any = None  # vllm's LoRARequest of it
    directory: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    @property
    def reproducible(self) -> bool:
        """Its batches depend on timing, and its rounding on them."""
        return False

    @property
    def level(self) -> int:
        """Of sleep."""
        return 2 if engine.adapter_of(self.model) is None else 1

    def update(self, model: Any) -> None:
        self.model, self.stale = model, True

    def __call__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int = 1,
        keys: Sequence[int] | None = None,
    ) -> list[Completion]:
        from vllm import SamplingParams  # type: ignore[import-not-found]

        ends = request(self.model, self.tokenizer, prompt_ids, sampling, num_generations, keys).ends
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        params = SamplingParams(**engine.settings(sampling, num_generations, ends))
        self._wake()
        outputs = self.llm.generate(prompts, params, lora_request=self.adapter, use_tqdm=False)
        self._sleep()
        made = [each for output in outputs for each in output.outputs]
        return [engine.completion(list(each.token_ids), _logp(each), sampling, ends) for each in made]

    def _wake(self) -> None:
        if self.sleeps:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # vLLM cannot use what torch's allocator holds on to
            self.llm.wake_up(tags=["weights"])
        if self.stale or (self.sleeps and self.level == 2):
            self._push()
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])

    def _sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=self.level)

    @torch.no_grad()
    def _push(self) -> None:
        if engine.adapter_of(self.model) is None:
            runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
            runner.model.load_weights(engine.named_weights(self.model))
        else:
            from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

            self.version += 1  # what has a number, vLLM keeps as it was
            path = engine.save_adapter(self.model, Path(self.directory.name) / str(self.version))
            self.adapter = LoRARequest(f"adapter-{self.version}", self.version, str(path))
        self.llm.reset_prefix_cache()
        self.stale = False


def _logp(output: Any) -> list[float]:
    return [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]


def _launched() -> None:
    """vLLM runs within this process as one of those that a launcher started; alone, it is the one of one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in alone.items():
        os.environ.setdefault(name, value)


def colocated(
    model: Any,
    tokenizer: Any,
    name: str,  # directory or hub name of the model, or of its adapter's base
    *,
    memory: float = 0.3,  # share of the GPU's, for weights and cache
    max_model_length: int | None = None,
    sleeps: bool = False,
    seed: int = 0,
) -> Colocated:
    """Loads vLLM beside the model; each rank has one of its own."""
    try:
        from vllm import LLM  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError("use_vllm needs vLLM, which is not installed: pip install vllm") from None
    config = engine.adapter_of(model)
    _launched()
    adapters: dict[str, Any] = {}
    if config is not None:
        adapters = {"enable_lora": True, "max_loras": 1, "max_lora_rank": engine.room_for(config.r)}
    if is_quantised(model):
        adapters["quantization"] = "bitsandbytes"
    llm = LLM(
        model=name,
        gpu_memory_utilization=memory,
        max_model_len=max_model_length,
        enable_sleep_mode=sleeps,
        logprobs_mode=engine.LOGPROBS_MODE,
        seed=seed + int(os.environ["RANK"]),  # ranks must not draw the same numbers
        distributed_executor_backend="external_launcher",
        **adapters,
    )
    found = Colocated(llm, model, tokenizer, sleeps)
    found._sleep()
    return found
