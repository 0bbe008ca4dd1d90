"""Tiny decoders of many families, and what transformers itself makes of sequences that are padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import tiny
from fastpost.packing import Example
from fastpost.reference import logits as materialised
from fastpost.types import Head

EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
# The caps are small and the windows shorter than the sequences, so that a model without them is another model.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 5},
    "gemma2": {
        "head_dim": 8,
        "sliding_window": 5,
        "query_pre_attn_scalar": 1,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {},
    "phi3": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "sliding_window": 5} | EXPERTS,
    "qwen3_moe": {"num_experts": 4, "head_dim": 8, "moe_intermediate_size": 16} | EXPERTS,
    "gpt_oss": {
        "num_local_experts": 4,
        "head_dim": 8,
        "sliding_window": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    | EXPERTS,
}
MIXTURES = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts", "gpt_oss": "num_local_experts"}


class Doubles(TorchFunctionMode):
    """float64 wherever code asks for float32: transformers' norms, rotations and softmaxes round to it otherwise."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        if func is Tensor.float:
            func = Tensor.double
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def examples(lengths: Sequence[int], seed: int = 0) -> list[Example]:
    """Random tokens; those after the first are to be predicted."""
    ids = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 97, (n,), generator=ids).tolist() for n in lengths]
    return [Example(row, [i > 0 for i in range(len(row))]) for row in rows]


def padded(rows: Sequence[Example]) -> tuple[Tensor, Tensor]:  # (S, L), (S, L)
    """Token ids and the attention mask, padded on the right."""
    longest = max(len(row.input_ids) for row in rows)
    mask = torch.tensor([[i < len(row.input_ids) for i in range(longest)] for row in rows])
    ids = torch.tensor([row.input_ids + [3] * (longest - len(row.input_ids)) for row in rows])
    return ids, mask.long()


def padded_logits(model: Any, rows: Sequence[Example]) -> Tensor:  # (T, V)
    """By transformers alone: its own attention, mask and head; the padding is dropped afterwards."""
    model.set_attn_implementation("eager")
    ids, mask = (x.to(model.device) for x in padded(rows))
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


def logits(model: Any, hidden: Tensor) -> Tensor:  # (1, T, D) -> (T, V)
    return materialised(hidden[0], Head.of(model))


def gradients(model: Any, output: Tensor, coefficients: Tensor | None = None) -> dict[str, Tensor]:
    """Of the sum of all elements, each with a coefficient of its own; of each parameter by its name."""
    if coefficients is None:
        coefficients = torch.linspace(-9, 9, output.numel(), dtype=output.dtype).view_as(output).cos().to(output)
    model.zero_grad()
    (output * coefficients).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def model(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Of random weights that bfloat16 holds, whatever the dtype."""
    return tiny.model(family, **(FAMILIES[family] | changes)).to(torch.bfloat16).to(dtype)
