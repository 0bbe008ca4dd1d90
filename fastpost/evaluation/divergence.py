"""Along given answers: their log-probability, the policy's entropy, and its KL to a reference, exact in each place.

  entropy  sum over tokens of H(p(. | before))            nats
  kl       sum over tokens of KL(p(. | before) || q(. | before))

On the policy's own samples the expectation of kl is the KL of whole answers, by the chain rule; each term is a sum over
the vocabulary and no draw, so its variance is at most that of log p/q of the sampled tokens (arXiv:2504.10637).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch

from fastpost import Head, token_stats
from fastpost.models.trunk import causal_lm, hidden_states
from fastpost.packing import Example, Packed, pack, plan

TOKENS = 8192  # of a pack: nothing of a pass is kept


@dataclass(frozen=True)
class Measured:
    """Sums over the tokens of an answer, nats."""

    logp: float
    entropy: float
    kl: float | None  # None: there is no reference


@torch.no_grad()
def measured(
    model: Any,
    reference: Any | None,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    temperature: float,
    precision: AbstractContextManager,
    own: Sequence[Sequence[bool] | None] | None = None,  # which of its tokens are the policy's; None: all
) -> list[Measured]:
    """One for each prompt and its answer."""
    examples = [
        Example([*prompt, *completion], [*[False] * len(prompt), *(mask or [True] * len(completion))])
        for prompt, completion, mask in zip(prompt_ids, completion_ids, own or repeat(None), strict=False)
    ]
    lengths = [len(example.input_ids) for example in examples]
    found: dict[int, Measured] = {}
    for rows in plan(lengths, max(TOKENS, *lengths)):
        packed = pack([examples[i] for i in rows]).to(causal_lm(model).device)
        with precision:
            found |= dict(zip(rows, _of_pack(model, reference, packed, temperature), strict=True))
    return [found[i] for i in range(len(examples))]


def _of_pack(model: Any, reference: Any | None, packed: Packed, temperature: float) -> list[Measured]:
    batch = packed.batch
    other = None if reference is None else (hidden_states(reference, packed)[0], Head.of(reference))
    stats = token_stats(
        hidden_states(model, packed)[0],
        Head.of(model),
        batch.target,
        outputs=("logp", "entropy", *(() if other is None else ("reverse_kl",))),
        reference=other,
        temperature=temperature,
    )
    assert stats.logp is not None and stats.entropy is not None
    logp, entropy = (batch.per_sequence(x.double()).tolist() for x in (stats.logp, stats.entropy))
    if stats.reverse_kl is None:
        return [Measured(*each, None) for each in zip(logp, entropy, strict=True)]
    kl = batch.per_sequence(stats.reverse_kl.double()).tolist()
    return [Measured(*each) for each in zip(logp, entropy, kl, strict=True)]
