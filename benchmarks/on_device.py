"""Random models of the Llama family in NF4, made on the device that they are for.

A layer is made, quantised and let go before the next: of a model of 70B, 141 GB in bfloat16, no more than one layer is
ever there unquantised. Embedding, head and norms stay in bfloat16, as QLoRA (arXiv:2305.14314) has them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastpost.models import attention
from fastpost.models.qlora import keep_differentiable

if TYPE_CHECKING:
    from transformers import LlamaConfig

SPREAD = 2.0  # standard deviation of the logits, about that of a model which has learnt


@dataclass(frozen=True)
class Shape:
    hidden: int  # D
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int  # V


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, 512),
    "8B": Shape(4096, 32, 32, 8, 14336, 128256),  # Llama 3
    "14B": Shape(5120, 48, 40, 8, 13824, 152064),  # Qwen 2.5
    "32B": Shape(5120, 64, 40, 8, 27648, 152064),  # Qwen 2.5
    "70B": Shape(8192, 80, 64, 8, 28672, 128256),  # Llama 3
}


def config_of(shape: Shape) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
        architectures=["LlamaForCausalLM"],
    )


def four_bit_model(shape: Shape, device: torch.device) -> Any:
    """Ready to be trained through adapters: packed attention, checkpointed layers. No token ends a text."""
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    with device:
        model: Any = AutoModelForCausalLM.from_config(
            config_of(replace(shape, layers=0)), dtype=torch.bfloat16, attn_implementation=attention.register()
        )
        nn.init.normal_(model.lm_head.weight, std=SPREAD * shape.hidden**-0.5)
        for i in range(shape.layers):
            model.model.layers.append(_in_four_bits(LlamaDecoderLayer(model.config, i).to(torch.bfloat16)))
    model.config.num_hidden_layers = shape.layers
    model.is_loaded_in_4bit = True  # so that peft puts its own kind of adapter around the layers
    keep_differentiable(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _in_four_bits(layer: nn.Module) -> nn.Module:
    for module in list(layer.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, _quantised(child))
    return layer


def _quantised(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    how = {"compress_statistics": True, "quant_type": "nf4"}
    made = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta", **how
    )
    weight = Params4bit(linear.weight.data, requires_grad=False, module=made, **how)
    made.weight = weight.to(linear.weight.device)  # which is when it quantises
    return made
