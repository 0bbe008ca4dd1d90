"""From a Hugging Face causal LM to its `Head`: logits = softcap(scale * (hidden @ weight.T + bias)), and its LoRA.
The weight may be one of bitsandbytes: NF4, FP4 or int8 (`fastpost.core.quantised`).

Families write the same thing under many names and in both directions (Granite divides by `logits_scaling`,
HyperCLOVA-X multiplies by it); the tables below are the only place that knows. Whatever they cannot express is refused
by name: a wrong head trains the wrong model without a sound.

A Head is what the model's head is at the time: which adapters are active, merged or disabled, and whether they drop.
So `Head.of` is called anew for each forward pass. Where its tensors are sharded, `fastpost.models.sharded` reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.core.quantised import KINDS, weight_of
from fastpost.models.sharded import Reader
from fastpost.models.trunk import causal_lm
from fastpost.types import Head, LowRank

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
MULTIPLY = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
DIVIDE = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3, Inkling
MULTIPLY_LOGITS_SCALING = "hyperclovax"
LORA = {"peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit", "peft.tuners.lora.bnb.Linear8bitLt"}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def head_of(model: nn.Module, same_tokens: bool | None = None) -> Head:
    """The Head of a causal LM, wrapped by DDP, FSDP2 or PEFT or not. Its tensors are the model's own, not copies, but
    where FSDP2 has them in pieces.

    same_tokens: of a weight that is a DTensor, whether its ranks have the same tokens (tensor parallel: each keeps its
    rows) or each its own (FSDP: gathered). None: as the mesh's names say, and ValueError where they do not.
    """
    lm = causal_lm(unwrapped(model))
    if not hasattr(lm, "get_output_embeddings"):
        raise ValueError(f"Head.of takes a Hugging Face causal LM, got {type(lm).__name__}")
    outer = lm.get_output_embeddings()
    _refuse_more_than_a_head(lm, outer)
    linear, lora = _linear_and_lora(outer)
    config = lm.config.get_text_config()
    weight = weight_of(linear) if type(linear.weight).__name__ in KINDS else linear.weight
    vocabulary = getattr(config, "unpadded_vocab_size", None) or weight.shape[0]
    reader = Reader(model, same_tokens)
    shard = reader.shard(linear.weight)
    if shard is not None and vocabulary < shard.vocabulary:
        raise ValueError(
            f"the head's {shard.vocabulary} rows are padded from a vocabulary of {vocabulary}, and sharded over ranks: "
            "pass fastpost.Head(weight, ..., shard=fastpost.types.Shard.of(weight, group)) without the padding"
        )

    def words(x: Any) -> Any:  # (V, ...)
        x = reader.plain(x)
        return x.narrow(0, 0, vocabulary) if vocabulary < x.shape[0] else x

    biases: list[Tensor] = [
        words(x) for x in (linear.bias, *(_bias(lora, name) for name in _active(lora))) if x is not None
    ]
    caps = [cap for name in SOFTCAPS if (cap := getattr(config, name, None))]
    return Head(
        weight=words(weight),
        bias=sum(biases[1:], biases[0]) if biases else None,
        softcap=caps[0] if caps else None,
        scale=_scale(config),
        lora=tuple(_low_rank(lora, name, reader.plain, words) for name in _active(lora)),
        shard=shard,
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """What DDP, or any wrapper that keeps the model as `.module`, has inside."""
    while not hasattr(model, "get_output_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model


def _scale(config: Any) -> float:
    """What the logits are multiplied by."""
    scale = 1.0
    for name in MULTIPLY:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVIDE:
        divisor = getattr(config, name, None) or 1.0
        multiplies = name == "logits_scaling" and config.model_type.startswith(MULTIPLY_LOGITS_SCALING)
        scale *= divisor if multiplies else 1 / divisor
    return scale


def _refuse_more_than_a_head(lm: Any, layer: Any) -> None:
    """BERT-like heads transform the hidden state first; then the output embedding is not all of the head."""
    if layer is None:
        raise ValueError(f"{type(lm).__name__} has no output embedding: Head.of takes a causal LM")
    decoder = getattr(lm, lm.base_model_prefix, None)
    children = dict(lm.named_children())
    rest = {name: child for name, child in children.items() if child not in (layer, decoder)}
    others = [name for name, child in rest.items() if next(child.parameters(), None) is not None]
    if layer not in children.values() or (decoder is not None and others):
        where = "inside another module" if layer not in children.values() else f"beside {', '.join(others)}"
        raise ValueError(
            f"{type(lm).__name__} keeps its output embedding {where}, so its head is more than one linear layer: "
            "pass fastpost.Head(weight, ...) and hidden states that are ready for it"
        )


def _linear_and_lora(layer: Any) -> tuple[nn.Linear, Any]:
    """The linear layer whose weight gives the logits now, and PEFT's LoRA layer around it, if its adapters are on."""
    if hasattr(layer, "modules_to_save") and hasattr(layer, "original_module"):
        active = [name for name in layer.active_adapters if name in layer.modules_to_save]
        layer = layer.original_module if layer.disable_adapters or not active else layer.modules_to_save[active[0]]
    linear = getattr(layer, "base_layer", layer)
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"the head is a {type(linear).__name__}, which Head.of does not know: pass fastpost.Head(weight, bias, ...)"
        )
    _refuse_unreadable(linear.weight)
    if linear is layer:
        return linear, None
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its own forward would, which the trunk does not reach
    if layer.disable_adapters or layer.merged:
        return linear, None
    _refuse_other_adapters(layer)
    return linear, layer


def _active(lora: Any) -> list[str]:
    """The adapters of this layer that its forward would add."""
    return [] if lora is None else [name for name in lora.active_adapters if name in lora.lora_A]


def _low_rank(lora: Any, name: str, plain: Callable[[Tensor], Tensor], words: Callable[[Tensor], Tensor]) -> LowRank:
    dropout = lora.lora_dropout[name]
    share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return LowRank(plain(lora.lora_A[name].weight), words(lora.lora_B[name].weight), lora.scaling[name], share)


def _bias(lora: Any, name: str) -> Tensor | None:  # (V,)
    bias = lora.lora_B[name].bias
    return None if bias is None else lora.scaling[name] * bias


def _refuse_other_adapters(layer: Any) -> None:
    """What adds anything else than scaling * B A to the head."""
    kinds = {f"{type(layer).__module__}.{type(layer).__name__}"} - LORA
    variants = getattr(layer, "lora_variant", {})
    kinds |= {type(variants[name]).__name__ for name in layer.active_adapters if name in variants}
    if kinds:
        raise ValueError(
            f"the head carries {', '.join(sorted(kinds))}, and Head.of takes plain LoRA alone: leave the head out of "
            "target_modules, or train it whole with modules_to_save=['lm_head']"
        )
    for name in _active(layer):
        _refuse_unreadable(layer.lora_A[name].weight)
        _refuse_unreadable(layer.lora_B[name].weight)


def _refuse_unreadable(weight: Tensor) -> None:
    """A weight that is elsewhere, or in a format of its own, cannot be multiplied with as it is."""
    kind = type(weight).__name__
    if kind not in KINDS and weight.dtype not in DTYPES:
        raise ValueError(
            f"the head's weight is quantised ({kind}, {weight.dtype}) in a way that Head.of does not read: leave the "
            "head out of the quantisation, as modules_to_not_convert=['lm_head'] does"
        )
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            "the head's weight is sharded (DeepSpeed ZeRO-3): call Head.of within deepspeed.zero.GatheredParameters"
        )
    if weight.is_meta or weight.ndim != 2:
        where = "on the meta device, so offloaded or not loaded yet" if weight.is_meta else f"{weight.ndim}-dimensional"
        raise ValueError(f"the head's weight is {where}, got shape {tuple(weight.shape)}: gather it first")
