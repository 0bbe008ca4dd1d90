"""Who is asked: a model that is not trained, behind a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fastpost.data import Prompt
from fastpost.models.adapters import base_of, is_adapter
from fastpost.models.loading import load_model
from fastpost.rollout import Sampler, Sampling, sampler_for
from fastpost.stages.config import Asking
from fastpost.trainers.config import Conversing
from fastpost.trainers.log import say
from fastpost.trainers.loop import autocast, the_device
from fastpost.trainers.task import turns_of
from fastpost.turns import Turns, load_tools


def frozen(config: Asking, path: str) -> tuple[Any, Any]:
    """A model that is not trained, on the device, and its tokenizer."""
    device = the_device()
    auto = "bfloat16" if device.type == "cuda" else "float32"
    model, tokenizer = load_model(
        path,
        dtype=auto if config.dtype == "auto" else config.dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    return model.requires_grad_(False).to(device).eval(), tokenizer


@dataclass(frozen=True)
class Policy:
    """A model and how it is asked."""

    model: Any
    tokenizer: Any
    sampler: Sampler
    sampling: Sampling
    precision: AbstractContextManager
    turns: Turns | None = None  # what is said between its turns; None: it has one

    def sampler_of(self, prompts: Sequence[Prompt]) -> Sampler:
        return self.sampler if self.turns is None else self.turns.sampler(self.sampler, prompts)

    @staticmethod
    def of(config: Asking, path: str | None = None) -> Policy:
        """The config's model, or another that is asked in the same way."""
        path = config.model if path is None else path
        model, tokenizer = frozen(config, path)
        sampling = config.sampling(config.seed)
        name = base_of(path) if is_adapter(path) else path
        sampler = sampler_for(config.backend, model, tokenizer, name, sampling, say, config.generation_batch_size)
        sampler.update(model)
        tools = load_tools(config.tools) if isinstance(config, Conversing) else []
        turns = turns_of(config, tools, model, tokenizer, sampling) if isinstance(config, Conversing) else None
        return Policy(model, tokenizer, sampler, sampling, autocast(config), turns)
