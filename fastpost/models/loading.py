"""A model directory -> (model, tokenizer), and back."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch


def load_model(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    lora_r: int = 0,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    lora_target_modules: str | Sequence[str] = "all-linear",
    load_in_4bit: bool = False,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """The causal LM and the tokenizer of a directory (or a hub name)."""
    raise NotImplementedError


def save_model(model: Any, tokenizer: Any, directory: str | PathLike[str]) -> None:
    """Writes model and tokenizer so that a killed process leaves the old directory or the new one, never half of either."""
    raise NotImplementedError
