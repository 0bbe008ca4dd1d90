"""QLoRA (arXiv:2305.14314): the base in 4 bits, frozen, under adapters that train.

  storage  4-bit normal floats (nf4), an absmax to every 64 of them, these quantised to 8 bits in turn
  compute  bfloat16, dequantised one layer at a time

What is usually done to such a model before training is not done here. The head and the embedding are not widened to
fp32 (Llama 3 8B: 4.2 GB in place of 2.1), since `fastpost.Head` has fp32 logits of bf16 weights; norms stay as they
are, since transformers' compute in fp32; inputs need no gradient, since checkpointing is not reentrant.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastpost.core.quantised import KINDS

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def four_bit_config(
    *,
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4",
    use_bnb_nested_quant: bool = True,
    bnb_4bit_quant_storage: str = "uint8",  # of the packed bytes; FSDP wants that of the other weights
) -> BitsAndBytesConfig:
    """transformers' BitsAndBytesConfig, by the names that TRL gives its fields. The head and the embedding stay."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=use_bnb_nested_quant,
        bnb_4bit_quant_storage=bnb_4bit_quant_storage,
        bnb_4bit_compute_dtype=_compute_dtype(),
    )


def _compute_dtype() -> torch.dtype:
    """bfloat16, but on a GPU that emulates it."""
    slow = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if slow else torch.bfloat16


def is_quantised(model: torch.nn.Module) -> bool:
    """Whether bitsandbytes holds some of the weights: they cannot train."""
    return any(type(parameter).__name__ in KINDS for parameter in model.parameters())


def keep_differentiable(model: Any) -> None:
    """bitsandbytes repacks a CPU weight at its first forward in eval mode, and then no gradient passes it any more."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
