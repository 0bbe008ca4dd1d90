"""The trunk over a pack: hidden states after the final norm, no logits, no token seeing another sequence.

Three ways, by how the model attends: packed attention of our own (`fastpost.models.attention`), flash attention told
where sequences end, or transformers' block-diagonal mask, which it builds from positions that restart at 0.
What is no causal attention over all of a sequence, or over a sliding window of it, is refused by the model's name.
Sequences that cannot share a pass (`fastpost.models.longrope`) go through the trunk in turns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpost.models import attention, longrope, router
from fastpost.packing import Packed
from fastpost.shared_prompt import AnyPack, SharedPack

LAYERS = {"full_attention", "sliding_attention", "attention"}  # what packs can do, of transformers' `layer_types`


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
    """How many positions the model knows, if it says so; rotations that are stretched know more."""
    return positions_of(causal_lm(model).config)


def positions_of(config: Any) -> int | None:
    """The same, by the config of a model."""
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    stretched = [
        int(each["factor"] * each["original_max_position_embeddings"])
        for each in longrope.rotations(config)
        if each.get("factor") and each.get("original_max_position_embeddings") and each.get("rope_type") != "dynamic"
    ]
    return None if known is None else max(known, *stretched, 0)


def hidden_states(model: nn.Module, packed: AnyPack) -> Tensor:  # (1, T, D)
    """The last hidden states of a causal LM over a pack, differentiable; what `Head.of(model)` turns into logits.

    Those of a `SharedPack` are in the order of its rows, so that they fit its batch: (1, R, D).
    A model that `load_model` did not load deserves one `fastpost.models.probe.probe` before it is trained.
    """
    return _rows(_run(model, packed)[0], packed)


def hidden_states_and_router_loss(model: nn.Module, packed: AnyPack) -> tuple[Tensor, Tensor]:
    """Those, and the load-balancing loss of a mixture of experts, not multiplied by its coefficient yet."""
    hidden, router_logits = _run(model, packed, output_router_logits=True)
    copies = packed.copies if isinstance(packed, SharedPack) else None
    loss = router.load_balancing_loss(causal_lm(model), router_logits, copies)
    return _rows(hidden, packed), loss


def takes_shared_prompts(model: nn.Module) -> bool:
    """Whether the model can go over a `SharedPack`: its attention must be our own."""
    return _attention(_decoder(causal_lm(model))) == attention.NAME


def _run(model: nn.Module, packed: AnyPack, **asked: bool) -> tuple[Tensor, Any]:
    """Hidden states, and the logits of routers, a tensor a layer, where they are asked for and there are any."""
    lm = causal_lm(model)
    decoder = _decoder(lm)
    _check_tokens(lm, packed)
    _check_lengths(lm, packed)
    sides = longrope.sides(lm, packed)
    if len(sides) == 1:
        return _pass(decoder, packed, **asked)
    assert isinstance(packed, Packed)
    parts, places = zip(*(longrope.part_of(packed, rows) for rows in sides), strict=True)
    hidden, routed = zip(*(_pass(decoder, part, **asked) for part in parts), strict=True)
    # A router's loss is a mean over tokens, in whatever order.
    logits = None if routed[0] is None else tuple(torch.cat(layer) for layer in zip(*routed, strict=True))
    return longrope.laid_back(hidden, places), logits


def _pass(decoder: Any, packed: AnyPack, **asked: bool) -> tuple[Tensor, Any]:
    apart = _apart(decoder, packed)
    found = decoder(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, **apart, **asked)
    return found.last_hidden_state, getattr(found, "router_logits", None)


def _rows(hidden: Tensor, packed: AnyPack) -> Tensor:  # (1, T, D) -> (1, T or R, D)
    if isinstance(packed, Packed):
        return hidden
    # As an embedding: where rows repeat, its gradient is summed in one order on a GPU, and that of an index is not.
    return F.embedding(packed.rows, hidden[0])[None]


def _decoder(lm: Any) -> Any:
    """Everything below the head."""
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else None
    decoder = getattr(lm, "model", None) if decoder is lm else decoder
    if decoder is None:
        inside = getattr(lm, "module", None)
        remedy = "" if inside is None else f": pass the {type(inside).__name__} inside it, from within its forward"
        raise ValueError(f"hidden_states takes a Hugging Face causal LM, got {type(lm).__name__}{remedy}")
    if lm.config.is_encoder_decoder:
        raise ValueError(f"{type(lm).__name__} is an encoder-decoder: packed training takes decoders alone")
    if getattr(lm, "_is_stateful", False):
        raise ValueError(
            f"{type(lm).__name__} has recurrent layers, which carry their state from one packed sequence into the "
            "next: packed training takes attention-only models"
        )
    strange = set(getattr(lm.config.get_text_config(), "layer_types", None) or ()) - LAYERS
    if strange:
        raise ValueError(
            f"{type(lm).__name__} has layers of {', '.join(sorted(strange))}, which do not know where a packed "
            "sequence begins: packed training takes full and sliding attention"
        )
    return decoder


def _attention(decoder: Any) -> str:
    return decoder.config._attn_implementation or "eager"


def _check_tokens(lm: Any, packed: AnyPack) -> None:
    """ValueError for a token that the model does not embed. An accelerator is not waited for to find one."""
    ids, V = packed.input_ids[0], lm.config.get_text_config().vocab_size
    if ids.device.type == "cpu" and len(strange := ids[(ids < 0) | (ids >= V)]):
        raise ValueError(f"input_ids must be from 0 to {V - 1} for {type(lm).__name__}, got {int(strange[0])}")


def _check_lengths(lm: Any, packed: AnyPack) -> None:
    """ValueError for a sequence of no token, or of more than the model has positions. Lengths are on the host."""
    lengths = packed.batch.lengths if isinstance(packed, Packed) else packed.lengths
    if lengths.device.type == "cpu" and int(lengths.min()) < 1:
        empty = int(lengths.argmin())
        raise ValueError(f"lengths must be positive, got {lengths[empty].item()} for sequence {empty} of the pack")
    known = positions(lm)
    if known is not None and packed.longest > known:
        raise ValueError(
            f"the pack's longest sequence has {packed.longest} tokens, but {type(lm).__name__} has {known} positions "
            "(max_position_embeddings): cut the row, or leave it out"
        )


def _apart(decoder: Any, packed: AnyPack) -> dict[str, Any]:
    """The arguments that keep the sequences of a pack apart."""
    how, device = _attention(decoder), packed.input_ids.device
    shared = isinstance(packed, SharedPack)
    if shared and how != attention.NAME:
        raise ValueError(
            f"shared prompts need attn_implementation={attention.NAME!r}, but {type(decoder).__name__} has {how!r}"
        )
    lengths = packed.lengths if shared else packed.batch.lengths
    if len(lengths) == 1 or how in ("sdpa", "eager", "flex_attention"):
        return {}
    layout = attention.Layout.of(lengths, packed.continues if shared else None).to(device)
    if how == attention.NAME:
        return {"attention_mask": layout.as_mask(), "max_length_q": packed.longest, "block_masks": {}}
    return {
        "cu_seq_lens_q": layout.bounds,
        "cu_seq_lens_k": layout.bounds,
        "max_length_q": packed.longest,
        "max_length_k": packed.longest,
    }
