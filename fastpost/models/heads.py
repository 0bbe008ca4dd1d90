"""From a Hugging Face causal LM to its `Head`: logits = softcap(scale * (hidden @ weight.T + bias))."""

from __future__ import annotations

import torch

from fastpost.types import Head


def head_of(model: torch.nn.Module) -> Head:
    """The Head of a causal LM, wrapped by DDP or PEFT or not."""
    raise NotImplementedError
