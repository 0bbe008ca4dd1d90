"""A linear layer in four bits as far as memory goes: the stand-in for bitsandbytes' Linear4bit in a plan.

Its weight is made dense for each product, in the forward pass and in the backward pass, and is gone after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

COMPUTE = torch.bfloat16


class Dequantised(torch.autograd.Function):
    """x @ weight.T, of which the weight as it is stored is kept, and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # (..., D), (V, D) -> (..., V)
        ctx.save_for_backward(weight)
        return x @ torch.empty(weight.shape, dtype=x.dtype, device=x.device).T

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (weight,), (g,) = ctx.saved_tensors, upstream
        return g @ torch.empty(weight.shape, dtype=g.dtype, device=g.device), None


class FourBits(nn.Linear):
    """The layer; its weight has the shape of the dense one, and `states.four_bit_bytes` says what it takes."""

    def forward(self, input: Tensor) -> Tensor:
        out = Dequantised.apply(input.to(COMPUTE), self.weight)
        assert isinstance(out, Tensor)
        return (out if self.bias is None else out + self.bias.to(COMPUTE)).to(input.dtype)


def quantise(model: Any) -> None:
    """Every linear layer but the head becomes one in four bits, as transformers' loader has it."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        if type(module) is nn.Linear and module is not head:
            module.__class__ = FourBits
            module.requires_grad_(False)
