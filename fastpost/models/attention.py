"""Exact attention over a pack: every sequence attends causally to itself, at the cost of its own length squared.

A (T, T) mask would pay for the whole pack squared. Instead `boundaries` (0, n_1, n_1 + n_2, ..., T) take the mask's
place, as a four-dimensional integer tensor, which transformers hands through to every layer as it is. With a mask of
any other kind (generation, padded batches) the layer does what transformers' own "sdpa" does.
On a GPU in half precision a pack goes to torch's varlen flash attention. Elsewhere sequences of like length are
right-padded together for plain causal SDPA: no real token comes after a padded one, so none ever sees it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

NAME = "fastpost_sdpa"  # with "sdpa" in it, transformers refuses models whose attention SDPA cannot express


def boundaries(lengths: Tensor) -> Tensor:  # (S,) -> (1, 1, 1, S + 1) int32
    """Where the sequences of a pack begin and end, in the shape of an attention mask."""
    ends = lengths.cumsum(0, dtype=torch.int32)
    return torch.cat([ends.new_zeros(1), ends])[None, None, None]


def is_boundaries(mask: Tensor | None) -> bool:
    """Whether an attention mask is in truth the `boundaries` of a pack."""
    return mask is not None and mask.dtype == torch.int32 and mask.ndim == 4


def register() -> str:
    """Makes packed attention known to transformers, beside its own, and returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, G, T, d), H a multiple of G
    value: Tensor,  # (1, G, T, dv)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,  # whatever else transformers hands to an attention function
) -> tuple[Tensor, None]:  # (1, T, H, dv)
    """Attention as transformers calls it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not is_boundaries(attention_mask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert attention_mask is not None and query.shape[0] == 1 and query.shape[2] == key.shape[2]
    unknown = {name for name in ("softcap", "s_aux", "position_bias", "cache") if kwargs.get(name) is not None}
    if unknown or not getattr(module, "is_causal", True):
        raise ValueError(
            f"{type(module).__name__} asks for attention that packed SDPA cannot give "
            f"({', '.join(sorted(unknown)) or 'not causal'}): load the model with attn_implementation='eager'"
        )
    bounds = attention_mask.flatten()
    if dropout == 0 and _has_varlen(query, value):
        return _varlen(query, key, value, bounds, max_length_q, scaling, sliding_window), None
    return _padded(module, query, key, value, bounds, dropout, scaling, sliding_window), None


def _has_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether torch's varlen flash attention takes these tensors."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > 256 or torch.version.hip is not None:
        return False
    from torch.nn.attention import varlen

    return "window_size" in inspect.signature(varlen.varlen_attn).parameters


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int | None,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One kernel over all sequences; no padding, and no wait for the device when `longest` is known."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
    longest = int(bounds.diff().max()) if longest is None else longest
    left = -1 if window is None else window - 1  # transformers counts the token itself, the kernel does not
    gqa = q.shape[1] != k.shape[1]
    window_size = (left, 0)  # (.., 0): causal
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window_size, enable_gqa=gqa)
    assert isinstance(out, Tensor)
    return out[None]


def _padded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Plain causal SDPA over right-padded groups of sequences, then everything back in its place."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    outs, places = [], []
    for index, real in groups(bounds):  # (n, L)
        q, k, v = (x[0][:, index].transpose(0, 1) for x in (query, key, value))  # (n, heads, L, d)
        mask = None if window is None or index.shape[1] <= window else _band(index.shape[1], window, query.device)
        out, _ = sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling)  # (n, L, H, dv)
        outs.append(out[real])
        places.append(index[real])
    return torch.cat(outs).index_select(0, torch.cat(places).argsort())[None]


def groups(bounds: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Positions (n, L) of the sequences of like length, and which are real: at least half of every row are."""
    starts, lengths = bounds[:-1].tolist(), bounds.diff().tolist()
    by_size: dict[int, list[int]] = {}
    for s, n in enumerate(lengths):
        if n:
            by_size.setdefault(n.bit_length(), []).append(s)
    found = []
    for rows in by_size.values():
        start = torch.tensor([starts[s] for s in rows], device=bounds.device)[:, None]
        length = torch.tensor([lengths[s] for s in rows], device=bounds.device)[:, None]
        step = torch.arange(max(lengths[s] for s in rows), device=bounds.device)
        found.append((start + torch.minimum(step, length - 1), step < length))
    return found


def _band(length: int, window: int, device: torch.device) -> Tensor:  # (1, 1, L, L) bool
    """Causal, and no further back than the window, the token itself included."""
    at = torch.arange(length, device=device)
    back = at[:, None] - at
    return ((back >= 0) & (back < window))[None, None]
