"""The trunk over a pack: hidden states after the final norm, no logits, no token seeing another sequence.

Three ways, by how the model attends: packed attention of our own (`fastpost.models.attention`), flash attention told
where sequences end, or transformers' block-diagonal mask, which it builds from positions that restart at 0.
Recurrent layers carry their state from one sequence into the next; a model that has any is refused by name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastpost.models import attention
from fastpost.packing import Packed


def causal_lm(model: nn.Module) -> Any:
    """The Hugging Face causal LM inside PEFT's wrapper; its adapters stay in it and stay active."""
    if hasattr(model, "get_base_model"):
        config: Any = getattr(model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"{config.peft_type} puts virtual tokens before every sequence, which a pack has no room for: use LoRA"
            )
        return model.get_base_model()  # type: ignore[operator]
    return model


def positions(model: nn.Module) -> int | None:
    """How many positions the model knows, if it says so."""
    return getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)


def hidden_states(model: nn.Module, packed: Packed) -> Tensor:  # (1, T, D)
    """The last hidden states of a causal LM over a pack, differentiable; what `Head.of(model)` turns into logits.

    A model that `load_model` did not load deserves one `fastpost.models.probe.probe` before it is trained.
    """
    decoder = _decoder(causal_lm(model))
    outputs = decoder(
        input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, **_apart(decoder, packed)
    )
    return outputs.last_hidden_state


def _decoder(lm: Any) -> Any:
    """Everything below the head."""
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else None
    decoder = getattr(lm, "model", None) if decoder is lm else decoder
    if decoder is None:
        inside = getattr(lm, "module", None)
        remedy = "" if inside is None else f": pass the {type(inside).__name__} inside it, from within its forward"
        raise ValueError(f"hidden_states takes a Hugging Face causal LM, got {type(lm).__name__}{remedy}")
    if getattr(lm, "_is_stateful", False):
        raise ValueError(
            f"{type(lm).__name__} has recurrent layers, which carry their state from one packed sequence into the "
            "next: packed training takes attention-only models"
        )
    return decoder


def _apart(decoder: Any, packed: Packed) -> dict[str, Any]:
    """The arguments that keep the sequences of a pack apart."""
    how = decoder.config._attn_implementation or "eager"
    if packed.batch.lengths.numel() == 1 or how in ("sdpa", "eager", "flex_attention"):
        return {}
    bounds = attention.boundaries(packed.batch.lengths.to(packed.input_ids.device))
    if how == attention.NAME:
        return {"attention_mask": bounds, "max_length_q": packed.longest}
    ends = bounds.flatten()
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": packed.longest,
        "max_length_k": packed.longest,
    }
