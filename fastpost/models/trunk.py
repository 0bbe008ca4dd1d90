"""The trunk over a pack: hidden states after the final norm, no logits, no token seeing another sequence."""

from __future__ import annotations

from torch import Tensor, nn

from fastpost.packing import Packed


def hidden_states(model: nn.Module, packed: Packed) -> Tensor:  # (1, T, D)
    """The last hidden states of a causal LM over a pack, differentiable."""
    raise NotImplementedError
