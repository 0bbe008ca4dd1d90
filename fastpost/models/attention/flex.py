"""Attention over a pack by torch's flex_attention, which skips the blocks that a layout leaves empty.

For what the flash kernels cannot do: prompts that completions share, soft caps without flash-attn, sinks. One compiled
call, whatever the pack; nothing is copied for a shared prompt. It has not been run on a GPU: the tests run it on the
CPU, uncompiled, against `exact`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpost.models.attention.layout import Layout, visible
from fastpost.models.attention.scores import Scores

LEAST_DIMENSIONS = 16  # of a head: what Triton multiplies
BlockMasks = dict[int | None, Any]  # by window: those that the layers of one forward pass share


def takes(query: Tensor, scores: Scores) -> bool:
    """Whether the compiled kernel does this."""
    fits = query.is_cuda and query.dtype != torch.float64 and query.shape[-1] >= LEAST_DIMENSIONS
    return fits and not scores.dropout


def block_mask(layout: Layout, tokens: int, window: int | None) -> Any:
    """The layout as flex_attention wants it."""
    from torch.nn.attention.flex_attention import create_block_mask

    sees, device = visible(layout, tokens, window), layout.bounds.device
    return create_block_mask(
        lambda batch, head, q, k: sees(q, k),
        B=None,
        H=None,
        Q_LEN=tokens,
        KV_LEN=tokens,
        device=str(device),
        _compile=device.type == "cuda",  # else all of (T, T) is held to find the blocks
    )


def packed(
    module: nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, G, T, d)
    value: Tensor,  # (1, G, T, dv)
    layout: Layout,
    scores: Scores,
    masks: BlockMasks,
) -> Tensor:  # (1, T, H, dv)
    """One call, by transformers, which has the soft cap and the sinks."""
    from transformers.integrations.flex_attention import flex_attention_forward

    if scores.window not in masks:
        masks[scores.window] = block_mask(layout, query.shape[2], scores.window)
    out, _ = flex_attention_forward(
        module,
        query,
        key,
        value,
        masks[scores.window],
        scaling=scores.scaling,
        softcap=scores.softcap,
        s_aux=scores.sinks,
    )
    return out
