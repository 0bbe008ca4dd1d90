"""`fastpost merge`: an adapter and its base -> one model."""

from __future__ import annotations

from pathlib import Path

from fastpost.models.adapters import base_of
from fastpost.models.loading import load_model
from fastpost.models.lora import beside_tied
from fastpost.models.merging import merged
from fastpost.models.qlora import four_bit_config, is_quantised
from fastpost.models.saving import save_model
from fastpost.trainers.config import Merge
from fastpost.trainers.log import say


def merge(config: Merge) -> None:
    """Writes the base of the adapter config.model, with the adapter in its weights, to config.output_dir."""
    inputs = {Path(path).expanduser().resolve() for path in (config.model, base_of(config.model))}
    if Path(config.output_dir).expanduser().resolve() in inputs:
        raise ValueError(f"output_dir {config.output_dir} holds what is merged: choose another directory")
    four_bit = four_bit_config(
        bnb_4bit_quant_type=config.bnb_4bit_quant_type, use_bnb_nested_quant=config.use_bnb_nested_quant
    )
    model, tokenizer = load_model(
        config.model,
        dtype=config.dtype,
        quantization_config=four_bit if config.load_in_4bit else None,
        trust_remote_code=config.trust_remote_code,
    )
    if is_quantised(model):
        say(f"the base {base_of(config.model)} is quantised: what is merged, and saved, is its dequantised weights")
    if beside_tied(model) is not None:
        say("the adapter is on one of two tied embeddings: in the merged model each has a weight of its own")
    save_model(merged(model), tokenizer, config.output_dir)
    say(f"saved {config.output_dir}")
