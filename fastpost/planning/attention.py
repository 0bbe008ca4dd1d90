"""What packed attention holds, acted out on fake tensors: the stand-in for `fastpost.models.attention` in a plan.

  cuda  a flash kernel over all sequences: q, k, v, the output and a logsumexp are kept (arXiv:2307.08691), and the
        backward pass sums dq in fp32 besides
  cpu   `attention.exact`, whose padded groups of like length are here one group of equal length; where a window is
        shorter than that, with its mask

Batches that are no packs, in generation, go the same ways.

transformers finds it under `NAME`, and where it wants a sequence's length, in `max_length_q`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.models.attention.scores import Scores, attend

NAME = "fastpost_planned_"  # and the kind of device


class Flash(torch.autograd.Function):
    """Attention by a flash kernel, as far as memory goes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (n, heads, L, d) each -> (n, L, H, dv)
        n, H, L, _ = q.shape
        out, lse = q.new_empty(n, L, H, v.shape[-1]), q.new_empty(n, H, L, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *_ = ctx.saved_tensors
        sums = q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape[:-1], dtype=torch.float32)
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del sums
        return gradients


def _exact(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, length: int, scores: Scores
) -> Tensor:  # (1, heads, T, d) -> (1, T, H, dv)
    """T / length sequences as one group."""
    T = query.shape[2]
    mask = None
    if scores.window is not None and scores.window < length:
        mask = query.new_empty(1, 1, length, length, dtype=torch.bool)
    if length == T:  # a pack of one sequence is left to transformers
        return attend(module, query, key, value, mask, scores)
    index = query.new_empty(T // length, length, dtype=torch.int64)
    q, k, v = (x[0][:, index].transpose(0, 1) for x in (query, key, value))  # (n, heads, L, d)
    out = attend(module, q, k, v, mask, scores).flatten(0, 1)[index.flatten()]
    return torch.cat([out]).index_select(0, index.flatten())[None]


def planned_attention(
    kind: str,
    module: nn.Module,
    query: Tensor,  # (n, H, L, d); n is 1 and L is T in a pack
    key: Tensor,  # (n, G, K, d)
    value: Tensor,  # (n, G, K, dv)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,  # whatever else transformers hands to an attention function
) -> tuple[Tensor, None]:  # (n, L, H, dv)
    """Attention as transformers calls it."""
    if kind == "cuda":
        out = Flash.apply(query, key, value)
        assert isinstance(out, Tensor)
        return out, None
    scores = Scores(scaling, sliding_window, softcap, s_aux, dropout)
    if max_length_q is None:
        return attend(module, query, key, value, attention_mask, scores), None
    return _exact(module, query, key, value, max_length_q, scores), None


def register(kind: str) -> str:
    """Makes it known to transformers for this kind of device, and returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME + kind, partial(planned_attention, kind))
    AttentionMaskInterface.register(NAME + kind, sdpa_mask)
    return NAME + kind
