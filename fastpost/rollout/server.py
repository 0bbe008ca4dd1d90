"""Sampling by a vLLM server, which has GPUs of its own.

  whole models   new weights go over NCCL, by TRL's client, which knows the protocols of vLLM's versions
  adapters       are written to a directory that the server sees too, and named to it

    trl vllm-serve --model NAME                                               (for whole models)
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 trl vllm-serve --model NAME --enable-lora --max-lora-rank 64      (for adapters)

Written from the documentation of vLLM (0.22 to 0.31) and of TRL 1.16, and not yet run against a server.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch

from fastpost.rollout import engine
from fastpost.rollout.request import request
from fastpost.rollout.sampling import Completion, Sampling

Post = Callable[[str, dict[str, Any]], None]  # (address, what is sent as JSON)
OF_CLIENT = ("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "logprobs")


def post(address: str, body: dict[str, Any]) -> None:
    asked = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(asked):
        pass


@dataclass
class Server:
    """A `Sampler`. The server has the model's weights of the first call after `update`."""

    client: Any  # trl's VLLMClient
    model: Any
    tokenizer: Any
    stale: bool = True
    version: int = 0  # of the adapter
    post: Post = post
    directory: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    @property
    def reproducible(self) -> bool:
        return False

    def update(self, model: Any) -> None:
        self.model, self.stale = model, True

    def __call__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int = 1,
        keys: Sequence[int] | None = None,
    ) -> list[Completion]:
        ends = request(self.model, self.tokenizer, prompt_ids, sampling, num_generations, keys).ends
        if self.stale:
            self._push()
        told = engine.settings(sampling, num_generations, ends)
        own = {name: told.pop(name) for name in OF_CLIENT}
        said = self.client.generate([list(ids) for ids in prompt_ids], **own, generation_kwargs=told)
        rows = zip(said["completion_ids"], said["logprobs"], strict=True)
        return [engine.completion(ids, _logp(steps), sampling, ends) for ids, steps in rows]

    @torch.no_grad()
    def _push(self) -> None:
        if engine.adapter_of(self.model) is None:
            self.client.update_named_params(engine.announced(self.model), engine.named_weights(self.model))
        else:
            self._push_adapter()
        self.client.reset_prefix_cache()
        self.stale = False

    def _push_adapter(self) -> None:
        """The new one first: what goes wrong leaves the old one to sample with."""
        name = f"adapter-{self.version + 1}"
        path = engine.save_adapter(self.model, Path(self.directory.name) / name)
        self.post(f"{self.client.base_url}/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        if self.version:
            self.post(f"{self.client.base_url}/v1/unload_lora_adapter", {"lora_name": self.client.model})
        self.client.model, self.version = name, self.version + 1


def _logp(steps: Sequence[Sequence[float | None]]) -> list[float]:
    """Of the sampled tokens, the one in each step. TRL's client has None for what is not a number."""
    return [torch.nan if step[0] is None else step[0] for step in steps]


def _check_mode(client: Any) -> None:
    mode = client.get_server_info().get("model_config", {}).get("logprobs_mode", engine.LOGPROBS_MODE)
    if mode != engine.LOGPROBS_MODE:
        raise ValueError(
            f"the vLLM server at {client.base_url} reports {mode}, which are at temperature 1: start it with "
            f"--logprobs-mode {engine.LOGPROBS_MODE}"
        )


def server(
    model: Any,
    tokenizer: Any,
    base_url: str,
    *,
    timeout: float = 240.0,  # seconds to wait for the server to be up
    group_port: int = 51216,  # of the weights' way to it
) -> Server:
    """Connects to a server that is up. One rank alone does this, and samples for all."""
    try:
        from trl.generation.vllm_client import VLLMClient

        client = VLLMClient(base_url=base_url, group_port=group_port, connection_timeout=timeout)
    except ImportError as error:
        raise ValueError(f"vllm_mode 'server' needs TRL and vLLM: pip install 'trl[vllm]' ({error})") from None
    _check_mode(client)
    if engine.adapter_of(model) is None:
        client.init_communicator(device=next(model.parameters()).device)
    return Server(client, model, tokenizer)
