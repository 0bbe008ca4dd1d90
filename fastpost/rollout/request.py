"""What all samplers do before they sample: look up what ends a completion, and refuse what cannot be sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastpost.models.heads import unwrapped
from fastpost.models.trunk import causal_lm, positions
from fastpost.rollout.sampling import Ends, Sampling


@dataclass(frozen=True)
class Request:
    """Of N prompts."""

    lm: Any  # the Hugging Face causal LM inside the model, its adapters in it
    ends: Ends
    pad: int
    keys: Sequence[int]  # N


def end_tokens(lm: Any, tokenizer: Any) -> frozenset[int]:
    """The tokenizer's EOS, and those the model came with: chat models end turns and texts with different tokens."""
    configured = lm.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [tokenizer.eos_token_id, *listed] if token is not None)


def _check_room(prompt_ids: Sequence[Sequence[int]], new: int, positions: int) -> None:
    i = max(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    longest = len(prompt_ids[i])
    if longest >= positions:
        raise ValueError(
            f"prompt_ids[{i}] has {longest} tokens, which leaves no room for a completion in the model's {positions} "
            "positions: cut it, or leave it out"
        )
    if longest + new > positions:
        raise ValueError(
            f"prompt_ids[{i}]: a prompt of {longest} tokens and max_completion_length {new} are more than the model's "
            f"{positions} positions: {positions - longest} would fit"
        )


def _check_keys(keys: Sequence[int], prompts: int) -> None:
    if len(keys) != prompts:
        raise ValueError(f"keys must be one a prompt: got {len(keys)} for {prompts} prompts")
    if len(set(keys)) < len(keys):
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"keys must differ, got {twice} twice: prompts of one key have the same samples")


def request(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    num_generations: int,
    keys: Sequence[int] | None,  # None: numbers of the prompts
) -> Request:
    if num_generations < 1:
        raise ValueError(f"num_generations must be at least 1, got {num_generations}")
    lm = causal_lm(unwrapped(model))
    vocabulary = lm.config.get_text_config().vocab_size
    if sampling.top_k > vocabulary:
        raise ValueError(
            f"top_k must be at most the {vocabulary} tokens of the vocabulary (0: all of them), got {sampling.top_k}"
        )
    for i, ids in enumerate(prompt_ids):
        if not len(ids):
            raise ValueError(f"prompt_ids[{i}] is empty: there is nothing to generate from")
    room = positions(lm)
    if room is not None and prompt_ids:
        _check_room(prompt_ids, sampling.max_completion_length, room)
    keys = range(len(prompt_ids)) if keys is None else keys
    _check_keys(keys, len(prompt_ids))
    ends = Ends(end_tokens(lm, tokenizer), sampling.stop, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends.tokens, default=0)
    return Request(lm, ends, pad, keys)
