"""Sampling by transformers' `generate`: prompts in, completions out, in prompt-major order.

Prompts are sorted by length, so that little is padded. What is sampled depends on `Sampling` alone, its seed included:
the model's own generation_config is set aside (many models ship a top_k and a repetition penalty in it, and then the
policy that samples is not the policy that is trained), except for the tokens that end a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpost.models.heads import unwrapped
from fastpost.models.trunk import causal_lm, positions


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float | None = None
    max_completion_length: int = 256  # tokens, EOS included
    seed: int = 0

    def __post_init__(self):
        in_range = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "at least 0 (0: all)"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            "max_completion_length": (self.max_completion_length >= 1, "at least 1"),
        }
        for name, (fits, right) in in_range.items():
            if not fits:
                raise ValueError(f"{name} must be {right}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Completion:
    """Generated tokens, the EOS among them when `finished`."""

    ids: list[int]
    finished: bool


def _end_tokens(lm: Any, tokenizer: Any) -> set[int]:
    """The tokenizer's EOS, and those the model came with: chat models end turns and texts with different tokens."""
    configured = lm.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [tokenizer.eos_token_id, *listed] if token is not None}


def _config(sampling: Sampling, ends: set[int], pad: int) -> Any:
    from transformers import GenerationConfig

    how: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        how |= {} if sampling.min_p is None else {"min_p": sampling.min_p}
    return GenerationConfig(
        **how,
        max_new_tokens=sampling.max_completion_length,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        use_cache=True,
    )


@contextmanager
def _generating(model: Any, lm: Any, config: Any, seed: int) -> Iterator[None]:
    """Eval mode (which also rests gradient checkpointing), our config, our seed; then all as it was."""
    was_training, own_config = model.training, lm.generation_config
    devices = [lm.device] if lm.device.type == "cuda" else []
    model.eval()
    lm.generation_config = config
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield
    finally:
        lm.generation_config = own_config
        model.train(was_training)


def _left_padded(rows: list[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:  # (B, P), (B, P)
    """Token ids and the mask of those that are real."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _cut(tokens: list[int], ends: set[int]) -> Completion:
    """Up to and with the first token that ends it."""
    length = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
    return Completion(tokens[:length], length is not None)


def _check(prompt_ids: Sequence[Sequence[int]], lm: Any, sampling: Sampling, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    for i, ids in enumerate(prompt_ids):
        if not len(ids):
            raise ValueError(f"prompt_ids[{i}] is empty: there is nothing to generate from")
    room = positions(lm)
    longest = max((len(ids) for ids in prompt_ids), default=0)
    if room and longest + sampling.max_completion_length > room:
        raise ValueError(
            f"a prompt of {longest} tokens and max_completion_length {sampling.max_completion_length} "
            f"are more than the model's {room} positions"
        )


def generate(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    num_generations: int = 1,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """num_generations completions of each prompt: those of prompt i begin at [i * num_generations].

    `batch_size` completions are decoded together; `progress` is told how many were just finished. The same model,
    prompts, sampling and batch_size give the same tokens; torch's global random state is neither used nor moved.
    """
    lm = causal_lm(unwrapped(model))
    _check(prompt_ids, lm, sampling, {"num_generations": num_generations, "batch_size": batch_size})
    ends = _end_tokens(lm, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    config = _config(sampling, ends, pad)
    slots = sorted(range(len(prompt_ids) * num_generations), key=lambda slot: len(prompt_ids[slot // num_generations]))
    found: dict[int, Completion] = {}
    with _generating(model, lm, config, sampling.seed):
        for start in range(0, len(slots), batch_size):
            batch = slots[start : start + batch_size]
            ids, mask = _left_padded([prompt_ids[slot // num_generations] for slot in batch], pad)
            out = lm.generate(ids.to(lm.device), attention_mask=mask.to(lm.device), generation_config=config)
            found |= {s: _cut(row, ends) for s, row in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True)}
            if progress is not None:
                progress(len(batch))
    return [found[slot] for slot in range(len(slots))]
