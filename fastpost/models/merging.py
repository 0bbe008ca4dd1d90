"""An adapter into its base: W + scaling B A (and DoRA's lengths), in the dtype of W.

A base in 4 or 8 bits is dequantised first: their sum, quantised again, would be another model. Of two embeddings that
are tied, the head gets a weight of its own first: peft would add its adapter to the embedding as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastpost.models.lora import beside_tied
from fastpost.models.qlora import is_quantised

if TYPE_CHECKING:
    from peft import PeftModel


@torch.no_grad()
def merged(model: PeftModel) -> Any:
    """The Hugging Face model with the adapter in its weights; takes the PeftModel apart."""
    if is_quantised(model):
        model = _dequantised(model)
    if beside_tied(model) is not None:
        _untie(model.get_base_model())
    try:
        return model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    except ValueError as error:
        raise ValueError(f"the adapter cannot be merged: {error}") from error


def _dequantised(model: PeftModel) -> PeftModel:
    """The same adapter on the base in floating point."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    (name,) = model.active_adapters
    config, state = model.peft_config[name], get_peft_model_state_dict(model, save_embedding_layers=False)
    base: Any = model.unload()  # type: ignore[operator]
    wide = get_peft_model(base.dequantize(), config, adapter_name=name)
    set_peft_model_state_dict(wide, state, adapter_name=name)
    return wide


def _untie(lm: Any) -> None:
    """A copy of the shared weight for the head."""
    head = _plain(lm.get_output_embeddings())
    if head.weight is _plain(lm.get_input_embeddings()).weight:
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    lm.config.get_text_config().tie_word_embeddings = False


def _plain(layer: Any) -> Any:
    """The layer beneath peft's."""
    return getattr(layer, "base_layer", getattr(layer, "original_module", layer))
