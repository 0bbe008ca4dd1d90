"""Attention over a pack by one flash kernel for all sequences: flash-attn's where it is installed, else torch's.

No padding, and no wait for the device where the longest length is known. Half precision on CUDA only. flash-attn is
told to be deterministic; torch's kernel cannot be, but for the whole process (torch.use_deterministic_algorithms).
"""

from __future__ import annotations

import functools
import importlib.util
import inspect

import torch
from torch import Tensor

from fastpost.models.attention.layout import Layout
from fastpost.models.attention.scores import Scores

MOST_DIMENSIONS = 256  # of a head, in either kernel


def takes(query: Tensor, value: Tensor, layout: Layout, scores: Scores) -> bool:
    """Whether there is a kernel for this."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16) or torch.version.hip is not None:
        return False
    if layout.continues is not None or scores.sinks is not None or scores.dropout:
        return False
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > MOST_DIMENSIONS or query.shape[-1] % 8:
        return False
    return has_flash_attn() or (scores.softcap is None and _torch_has_windows())


@functools.cache
def has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _torch_has_windows() -> bool:
    from torch.nn.attention import varlen

    return "window_size" in inspect.signature(varlen.varlen_attn).parameters


def packed(
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, G, T, d)
    value: Tensor,  # (1, G, T, d)
    layout: Layout,
    scores: Scores,
    longest: int | None,
) -> Tensor:  # (1, T, H, d)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
    longest = int(layout.bounds.diff().max()) if longest is None else longest
    left = -1 if scores.window is None else scores.window - 1  # transformers counts the token itself, kernels do not
    attend = _flash_attn if has_flash_attn() else _torch
    return attend(q, k, v, layout.bounds, longest, scores, (left, 0))[None]  # (.., 0): causal


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scores: Scores, window: tuple[int, int]
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func(
        q,
        k,
        v,
        bounds,
        bounds,
        longest,
        longest,
        softmax_scale=scores.scaling,
        causal=True,
        window_size=window,
        softcap=scores.softcap or 0.0,
        deterministic=True,  # of the backward pass, which else adds up dq in whatever order blocks end
    )


def _torch(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scores: Scores, window: tuple[int, int]
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    gqa = q.shape[1] != k.shape[1]
    out = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scores.scaling, window_size=window, enable_gqa=gqa
    )
    assert isinstance(out, Tensor)
    return out
