"""A model that scores: the trunk of a causal LM under a scalar head, trained whole, or by an adapter and the head.

It is AutoModelForSequenceClassification with one label: what a run leaves loads there, and as `Roles.of(reward=...)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpost.models.loading import attend_packed, recompute_activations
from fastpost.models.lora import with_lora
from fastpost.models.probe import check_packing
from fastpost.models.reward_model import load_reward_model
from fastpost.models.scalar import own_scalar
from fastpost.models.trunk import causal_lm
from fastpost.trainers.build import Kind, adapter_of, build, dtype_of, four_bits
from fastpost.trainers.config import Training
from fastpost.trainers.given import Given
from fastpost.trainers.start import Parts


def judge(config: Training, given: Given, found: Path | None) -> Parts:
    """The model of a config with its scalar head; a new head, which says 0, where there is none yet."""
    model, tokenizer = build(config, given, found, Kind(_loaded, _prepared))
    causal_lm(model).config.pad_token_id = tokenizer.pad_token_id  # where its own forward is to find the last token
    return Parts.of(model, tokenizer)


def _loaded(config: Training, path: str) -> tuple[Any, Any]:
    """Of a directory: a causal LM, a model that scores, or an adapter of one."""
    model, tokenizer = load_reward_model(
        path,
        fresh=True,
        dtype=dtype_of(config),
        attn_implementation=config.attn_implementation,
        quantization_config=four_bits(config) if config.load_in_4bit else None,
        trust_remote_code=config.trust_remote_code,
    )
    return _adapted(config, model), tokenizer


def _prepared(config: Training, model: Any) -> Any:
    """One that is loaded."""
    own_scalar(model, "model")
    if config.attn_implementation is None:
        attend_packed(causal_lm(model))
    check_packing(model)
    return _adapted(config, model)


def _adapted(config: Training, model: Any) -> Any:
    """With a fresh adapter where one is wanted; beside it the head trains whole."""
    if config.lora_r:
        fresh = adapter_of(config)
        fresh.task_type = "SEQ_CLS"
        fresh.modules_to_save = [*(fresh.modules_to_save or ()), "score"]
        model = with_lora(model, fresh)
    if config.gradient_checkpointing:
        recompute_activations(model)
    return model
