"""Attention as transformers calls it: over a pack where a `Layout` is in the mask's place, else what "sdpa" does.

A layer may ask for what none of our ways to attend can give, or have its window in the mask alone, which a layout
replaces. Both are refused by the layer's name: attention that is slightly wrong makes no sound.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastpost.models.attention import exact, flex, varlen
from fastpost.models.attention.layout import Layout
from fastpost.models.attention.scores import Scores, attend

NAME = "fastpost"
# What models hand to an attention function that changes nothing in it.
HARMLESS = {
    *("position_ids", "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("max_length_k", "num_items_in_batch", "cache_position", "is_causal"),
}


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    max_length_q: int | None = None,
    block_masks: flex.BlockMasks | None = None,
    **kwargs: Any,  # whatever else transformers hands to an attention function
) -> tuple[Tensor, None]:  # (1, T, H, dv)
    """Attention as transformers calls it."""
    scores = Scores(scaling, sliding_window, softcap, s_aux, dropout)
    layout = Layout.read(attention_mask)
    if layout is None:
        return _unpacked(module, query, key, value, attention_mask, scores, kwargs), None
    _check(module, scores, kwargs)
    assert query.shape[0] == 1 and query.shape[2] == key.shape[2]
    if varlen.takes(query, value, layout, scores):
        return varlen.packed(query, key, value, layout, scores, max_length_q), None
    if flex.takes(query, scores) and (layout.continues is not None or not scores.plain):
        masks = {} if block_masks is None else block_masks
        return flex.packed(module, query, key, value, layout, scores, masks), None
    return exact.packed(module, query, key, value, layout, scores), None


def _unpacked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scores: Scores,
    kwargs: dict[str, Any],
) -> Tensor:
    """Generation and padded batches."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not scores.plain:
        _refuse(module, _strange(kwargs))
        return attend(module, query, key, value, mask, scores)
    out, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=scores.dropout, scaling=scores.scaling, **kwargs
    )
    return out


def _check(module: nn.Module, scores: Scores, kwargs: dict[str, Any]) -> None:
    """ValueError for a layer that asks for more than `Scores` can say."""
    asked = _strange(kwargs)
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        asked.append("not causal")
    if scores.window is None and (window := _window_of(module)) is not None:
        asked.append(f"a window of {window} in its mask alone")
    _refuse(module, asked)


def _strange(kwargs: dict[str, Any]) -> list[str]:
    return sorted(name for name, given in kwargs.items() if given is not None and name not in HARMLESS)


def _refuse(module: nn.Module, asked: list[str]) -> None:
    if asked:
        raise ValueError(
            f"{type(module).__name__} asks for attention that packs do not have here ({', '.join(asked)}): "
            "load the model with attn_implementation='eager'"
        )


def _window_of(module: nn.Module) -> int | None:
    """The sliding window that the config gives this layer, if it is shorter than what the model has positions for."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if not window or (kinds and layer is not None and kinds[layer] != "sliding_attention"):
        return None
    return window if window < getattr(config, "max_position_embeddings", window + 1) else None
