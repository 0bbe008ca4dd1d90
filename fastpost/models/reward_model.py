"""A reward model of a directory: a model that scores, or an adapter of one with its head."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastpost.models.adapters import base_of, is_adapter, load_adapter, read_adapter
from fastpost.models.loading import load_tokenizer
from fastpost.models.scalar import load_scored

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

PRM = "prm.json"  # beside the weights of a model that scores steps: what ends one


def load_reward_model(
    path: str | PathLike[str],
    *,
    fresh: bool = False,  # a causal LM is taken too, with a new head that says 0
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """The model, its head at `score`, and its tokenizer."""
    where = f"model {str(path)!r}"
    tokenizer, _ = load_tokenizer(path, trust_remote_code)
    model = load_scored(
        base_of(path) if is_adapter(path) else path,
        where,
        fresh=fresh or is_adapter(path),  # an adapter brings the head
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization_config=quantization_config,
        trust_remote_code=trust_remote_code,
    )
    if is_adapter(path):
        _check_task(path, where)
        model = load_adapter(model, path)
    return model, tokenizer


def step_separator(path: str | PathLike[str]) -> str | None:
    """What ends a step, of a directory of a model that scores steps; None of any other."""
    file = Path(path) / PRM
    return json.loads(file.read_text(encoding="utf-8"))["step_separator"] if file.is_file() else None


def _check_task(path: str | PathLike[str], where: str) -> None:
    config, _ = read_adapter(Path(path).expanduser(), where)
    if config.task_type != "SEQ_CLS":
        raise ValueError(
            f"{where} is an adapter that speaks ({config.task_type}), and has no score: merge it into its base "
            "(fastpost merge), and train on that"
        )
