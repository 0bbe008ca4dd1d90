"""From a config to the model that it asks for: weights, quantisation, adapters, and what saves memory around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastpost.models.loading import attend_packed, load_model, prepare_model
from fastpost.models.lora import beside_tied, lora_config
from fastpost.models.memory import offload_activations, tile_mlps
from fastpost.models.qlora import four_bit_config, is_quantised
from fastpost.models.trunk import causal_lm
from fastpost.trainers.config import Training
from fastpost.trainers.given import Given
from fastpost.trainers.log import say
from fastpost.trainers.loop import the_device, trainable, wants_bf16

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig


def adapter_of(config: Training) -> LoraConfig:
    """The fresh adapter that a config asks for."""
    return lora_config(
        config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        lora_target_modules=config.lora_target_modules,
        lora_modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=True if config.init_lora_weights == "default" else config.init_lora_weights,
    )


@dataclass(frozen=True)
class Kind:
    """What there is to be built: how it is loaded, adapter included, and what one that is given lacks."""

    load: Callable[[Training, str], tuple[Any, Any]]  # of a directory
    prepare: Callable[[Training, Any], Any]  # model -> model


def build(
    config: Training, given: Given | None = None, found: Path | None = None, kind: Kind | None = None
) -> tuple[Any, Any]:
    """Model and tokenizer as the config wants them, of its directory or of what is given, with the weights of a
    checkpoint where one is `found`. kind None: a causal LM."""
    given, kind = given or {}, kind or Kind(_loaded, _prepared)
    base = given.get("model")
    adapts = config.trains_adapter or hasattr(base, "peft_config")
    # An adapter's checkpoint holds the adapter alone; its base is still where it was.
    if base is not None and (adapts or found is None):
        model, tokenizer = _given(base, given, config, kind)
    else:
        path = config.model if adapts or found is None else str(found)
        if not path:
            raise ValueError("model must be given: a directory in the config, or a model as `model`")
        model, tokenizer = kind.load(config, path)
    if not adapts and is_quantised(model):
        name = repr(config.model or type(model).__name__)
        raise ValueError(f"model {name} is quantised, so its weights cannot train: give lora_r, 16 say, for adapters")
    if adapts:
        _widen(model, config)
        if (note := beside_tied(model)) is not None:
            say(note)
    if found is not None and adapts:
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(found), device="cpu"))
    if config.use_liger_kernel:
        from fastpost.integrations.liger import apply_liger

        apply_liger(model)
    if config.tiled_mlp:
        tile_mlps(model, config.tiled_mlp)
    if config.activation_offloading:
        offload_activations(model)
    return model, tokenizer


def _loaded(config: Training, path: str) -> tuple[Any, Any]:
    """Of a directory."""
    return load_model(
        path,
        dtype=dtype_of(config),
        attn_implementation=config.attn_implementation,
        peft_config=adapter_of(config) if config.lora_r else None,
        quantization_config=four_bits(config) if config.load_in_4bit else None,
        gradient_checkpointing=config.gradient_checkpointing,
        trust_remote_code=config.trust_remote_code,
    )


def _prepared(config: Training, model: Any) -> Any:
    """One that is loaded."""
    if config.attn_implementation is None:
        attend_packed(causal_lm(model))
    peft_config = adapter_of(config) if config.lora_r else None
    return prepare_model(model, peft_config, config.gradient_checkpointing)


def _given(model: Any, given: Given, config: Training, kind: Kind) -> tuple[Any, Any]:
    """A model that the caller has loaded, with its tokenizer."""
    tokenizer = given.get("processing_class")
    if tokenizer is None:
        raise ValueError("processing_class must be given beside a model: its tokenizer")
    if hasattr(model, "peft_config") and config.lora_r:
        raise ValueError("the model has an adapter, which trains on as it is: leave lora_r out, or merge it first")
    return kind.prepare(config, model), tokenizer


def dtype_of(config: Training, device: str | None = None) -> str:
    """Of the weights, as the config has it or by its default; on a kind of device, by default the one that is here."""
    frozen_on_gpu = config.trains_adapter and (device or the_device().type) == "cuda"
    return ("bfloat16" if frozen_on_gpu else "float32") if config.dtype == "auto" else config.dtype


def _widen(model: Any, config: Training) -> None:
    """What trains beside adapters, to fp32, as peft has these: products are in bfloat16 all the same, by autocast."""
    narrow = [parameter for parameter in trainable(model) if parameter.dtype in (torch.bfloat16, torch.float16)]
    if wants_bf16(config):
        widen(narrow)
    elif narrow:
        kind = str(narrow[0].dtype).removeprefix("torch.")
        lost = f"{len(narrow)} of the trained tensors in {kind}, which rounds small steps away"
        say(f"{lost}: give bf16 as well, or dtype float32")


def widen(parameters: Iterable[nn.Parameter]) -> None:
    """To fp32, in place."""
    for parameter in parameters:
        parameter.data = parameter.data.float()


def four_bits(config: Training) -> BitsAndBytesConfig:
    return four_bit_config(
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        use_bnb_nested_quant=config.use_bnb_nested_quant,
        bnb_4bit_quant_storage=config.bnb_4bit_quant_storage,
    )
