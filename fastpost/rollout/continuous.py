"""Sampling by transformers' continuous batching: a completion that ends makes room for the next one at once.

It is for GPUs. On a CPU, and where completions are short or end together, `generate` is faster: `sampler.Tried` finds
out. Samples come from one stream of random numbers, in an order that threads decide, and so are not reproducible.
It knows neither repetition penalty nor min-p, and stop strings only cut what was generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import shake_128
from typing import Any

import torch

from fastpost.models import attention
from fastpost.rollout.generate import generating
from fastpost.rollout.request import request
from fastpost.rollout.sampling import Completion, Ends, Sampling


def _config(sampling: Sampling, ends: Ends, pad: int) -> Any:
    from transformers import GenerationConfig

    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        drawn = {"do_sample": True, "temperature": sampling.temperature}
        drawn |= {"top_k": sampling.top_k, "top_p": sampling.top_p}
    return GenerationConfig(
        **drawn,
        max_new_tokens=sampling.max_completion_length,
        eos_token_id=sorted(ends.tokens) or None,
        pad_token_id=pad,
    )


@contextmanager
def _plain_attention(lm: Any) -> Iterator[None]:
    """It pages the cache for transformers' own attention alone."""
    own = lm.config._attn_implementation
    if own == attention.NAME:
        lm.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        lm.set_attn_implementation(own)


@dataclass(frozen=True)
class Continuous:
    """A `Sampler` of a model that is trained in place."""

    model: Any
    tokenizer: Any
    max_memory_percent: float | None = None  # of what is free, for the cache; None: transformers' choice

    @property
    def reproducible(self) -> bool:
        return False

    def takes(self, sampling: Sampling) -> bool:
        return sampling.repetition_penalty == 1 and not sampling.min_p

    def update(self, model: Any) -> None:
        """Nothing to do: the weights are the model's own, and no cache outlives a call."""

    def __call__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int = 1,
        keys: Sequence[int] | None = None,
    ) -> list[Completion]:
        if not self.takes(sampling):
            raise ValueError(
                "transformers' continuous batching has no repetition_penalty and no min_p, got "
                f"{sampling.repetition_penalty} and {sampling.min_p}: set use_transformers_continuous_batching to false"
            )
        asked = request(self.model, self.tokenizer, prompt_ids, sampling, num_generations, keys)
        # Ranks, which have other keys, must not draw the same numbers.
        seed = int.from_bytes(shake_128(f"{sampling.seed} {[*asked.keys]}".encode()).digest(4)) >> 1
        inputs = [list(ids) for ids in prompt_ids for _ in range(num_generations)]
        outputs = self._generated(asked.lm, inputs, _config(sampling, asked.ends, asked.pad), seed)
        return [asked.ends.cut(o.generated_tokens, o.logprobs if sampling.unfiltered else []) for o in outputs]

    def _generated(self, lm: Any, inputs: list[list[int]], config: Any, seed: int) -> list[Any]:
        from transformers import ContinuousBatchingConfig

        batching = ContinuousBatchingConfig(return_logprobs=True, seed=seed, max_memory_percent=self.max_memory_percent)
        devices = [lm.device] if lm.device.type == "cuda" else []
        with generating(self.model, lm, config), _plain_attention(lm), torch.random.fork_rng(devices):
            found = lm.generate_batch(inputs, generation_config=config, continuous_batching_config=batching)
        outputs = list(found.values())
        errors = [output.error for output in outputs if output.error is not None]
        if errors or len(outputs) < len(inputs):
            raise RuntimeError(
                f"continuous batching finished {len(outputs) - len(errors)} of {len(inputs)} completions: "
                f"{errors[0] if errors else 'its thread stopped'}"
            )
        return outputs
