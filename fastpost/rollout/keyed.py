"""Samples that depend on what they are of, and on nothing beside it.

  u(s, k, j, i)   of 53 bits, from SHAKE-128 of (seed, key of the prompt, number of the sample), its i-th word
  token           the first whose cumulated probability exceeds u: the inverse of the distribution function

So the j-th completion of a prompt is the same in any batch, order, or process, and only goes on where it may be longer.
What is left is the rounding of the logits, which may differ by batch, and flips a token as rarely as it is small.
Torch's generators begin with 32 bits of their seed: of 100,000 rows some would be twins.

Probabilities are rounded down to multiples of 2^-52 and cumulated as integers. That is exact in any order: on a GPU,
where a cumulated sum of floats is not the same from run to run, and may step up at a token of probability 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import shake_128
from typing import Any

import torch
from torch import Tensor

from fastpost.rollout.sampling import Sampling

Filters = Callable[[Any, Any], Tensor]  # (token ids so far (B, P), logits (B, V)) -> logits (B, V)


def uniforms(seed: int, key: int, sample: int, count: int) -> Tensor:  # (count,) fp64, in [0, 1)
    """Those of a completion, by position; a larger `count` begins with the same ones."""
    words = bytearray(shake_128(f"{seed} {key} {sample}".encode()).digest(8 * count))
    return (torch.frombuffer(words, dtype=torch.int64) & (2**53 - 1)).double() * 2.0**-53


def inverse_cdf(logits: Tensor, u: Tensor) -> Tensor:  # (B, V), (B,) fp64 -> (B,)
    """One token a row; one of probability 0 never."""
    cdf = (logits.double().softmax(-1) * 2.0**52).long().cumsum(-1)
    reached = (u * cdf[:, -1]).long()  # below the total, which fp64 holds exactly, since u is below 1
    # NaN has no place in an order: the caller finds it in logp.
    return torch.searchsorted(cdf, reached[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


@dataclass(frozen=True)
class Chosen:
    """The last of `generate`'s logits processors: it leaves one token a row for greedy decoding to take, and notes its
    log-probability."""

    prompt: int  # tokens before the first new one, padding included
    temperature: float
    filters: Filters
    uniforms: Tensor | None  # (B, L); None: the likeliest token
    logp: list[Tensor] = field(default_factory=list)  # (B,) a position

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = self.filters(input_ids, scores)
        if self.uniforms is None:
            chosen = allowed.argmax(-1)
        else:
            chosen = inverse_cdf(allowed, self.uniforms[:, input_ids.shape[1] - self.prompt])
        logits = scores / self.temperature
        self.logp.append(logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def filters(sampling: Sampling, padding: Tensor) -> Filters:  # padding: (B,) tokens before each prompt
    """transformers' own, in the order of its `generate`."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty), prompt_ignore_length=padding))
    if sampling.temperature not in (0, 1):
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found


def chosen(
    sampling: Sampling,
    of: Sequence[tuple[int, int]],  # B: key and number of the sample
    mask: Tensor,  # (B, P), on the model's device; 0: padding
) -> Chosen:
    """For a batch of left-padded prompts."""
    rows = [uniforms(sampling.seed, key, sample, sampling.max_completion_length) for key, sample in of]
    drawn = torch.stack(rows).to(mask.device) if sampling.temperature else None
    padding = (mask == 0).sum(-1)
    return Chosen(mask.shape[1], sampling.temperature or 1.0, filters(sampling, padding), drawn)
