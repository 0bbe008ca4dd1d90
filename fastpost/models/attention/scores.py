"""softmax(cap(scaling * q k')) v, with all that a layer may ask of its scores: a soft cap, sinks, dropout.

  cap(s)  softcap * tanh(s / softcap)   (Gemma 2, arXiv:2408.00118)
  sinks   one more logit a head in the softmax, which no value belongs to (gpt-oss, arXiv:2508.10925)

Without either this is SDPA. With them the scores are held, one float for each pair of a query and a key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Scores:
    """What a layer asks for."""

    scaling: float | None = None  # None: 1 / sqrt(d)
    window: int | None = None  # positions that a token sees, its own included; None: all
    softcap: float | None = None
    sinks: Tensor | None = None  # (H,)
    dropout: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether SDPA can give them."""
        return self.softcap is None and self.sinks is None


def attend(
    module: nn.Module,
    query: Tensor,  # (n, H, L, d)
    key: Tensor,  # (n, G, K, d), H a multiple of G
    value: Tensor,  # (n, G, K, dv)
    mask: Tensor | None,  # (n or 1, 1, L, K), bool or added; None: causal, if the layer is
    scores: Scores,
) -> Tensor:  # (n, L, H, dv)
    """Attention of each of n sequences; the window must be in the mask already."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if scores.plain:
        out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=scores.dropout, scaling=scores.scaling)
        return out
    n, H, L, d = query.shape
    G, K = key.shape[1:3]
    if mask is None and L > 1 and getattr(module, "is_causal", True):
        mask = torch.ones(L, K, dtype=torch.bool, device=query.device).tril()
    scaling = d**-0.5 if scores.scaling is None else scores.scaling
    products = (query.reshape(n, G, -1, d) @ key.mT).view(n, H, L, K)
    weights = _softmax(scaling * products.to(torch.promote_types(products.dtype, torch.float32)), mask, scores)
    weights = F.dropout(weights, scores.dropout).to(value.dtype)
    out = weights.reshape(n, G, -1, K) @ value
    return out.view(n, H, L, -1).transpose(1, 2).contiguous()


def _softmax(logits: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:  # (n, H, L, K) -> the same
    """Capped, masked, and beside the sinks."""
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    if mask is not None and mask.dtype == torch.bool:
        # A padded row may see nothing at all: with the lowest number in place of -inf it stays finite.
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    elif mask is not None:
        logits = logits + mask
    if scores.sinks is None:
        return logits.softmax(-1)
    sinks = scores.sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
