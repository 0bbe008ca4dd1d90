"""QLoRA: what is quantised and what stays, how many bytes that is, and that nothing but adapters trains."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tiny
from fastpost.models.loading import load_model
from fastpost.models.lora import lora_config
from fastpost.models.qlora import four_bit_config, is_quantised
from fastpost.models.saving import save_model
from fastpost.trainers.config import Sft
from fastpost.trainers.start import start

# Large enough that every absmax is in a block of 256 of them; 97 words, as the tokenizer has.
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "tie_word_embeddings": False}
ENDS = ("embed_tokens", "lm_head")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "tiny"
    save_model(tiny.model("qwen3", **SHAPE), tiny.tokenizer(), path)
    return path


def quantised(base: Path, **changes):
    return load_model(base, dtype="bfloat16", quantization_config=four_bit_config(**changes))[0]


def scale_bytes(model) -> int:
    """What the absmaxes of the 4-bit weights take, and those of their own."""
    states = [weight.quant_state for weight in model.parameters() if type(weight).__name__ == "Params4bit"]
    found = [state.absmax for state in states] + [state.state2.absmax for state in states if state.nested]
    return sum(x.numel() * x.itemsize for x in found)


def own_bytes(model) -> int:
    return sum(p.numel() * p.itemsize for p in model.parameters())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_head_embedding_and_norms_keep_their_dtype_and_adapters_are_fp32(base: Path, gradient_checkpointing: bool):
    model, _ = load_model(
        base,
        dtype="bfloat16",
        quantization_config=four_bit_config(),
        peft_config=lora_config(2),
        gradient_checkpointing=gradient_checkpointing,
    )
    for name, parameter in model.named_parameters():
        adapter, four_bit = "lora_" in name, name.endswith("proj.base_layer.weight")
        assert parameter.requires_grad == adapter, name
        assert parameter.dtype == (torch.float32 if adapter else torch.uint8 if four_bit else torch.bfloat16), name


def test_the_widening_that_is_left_out_would_double_what_is_not_quantised(base: Path):
    """peft's preparation, which TRL calls, on the same model."""
    ours = quantised(base)
    theirs = prepare_model_for_kbit_training(copy.deepcopy(ours), use_gradient_checkpointing=False)
    kept = sum(p.numel() * p.itemsize for p in ours.parameters() if type(p).__name__ != "Params4bit")
    assert own_bytes(theirs) - own_bytes(ours) == kept >= 2 * 2 * 97 * 256


def test_bytes_are_those_of_the_paper(base: Path):
    """4 bits a weight, and 8 / 64 + 32 / (64 * 256) for its scales; without double quantisation 32 / 64."""
    nested, plain = quantised(base), quantised(base, use_bnb_nested_quant=False)
    weights = [p for p in nested.parameters() if type(p).__name__ == "Params4bit"]
    count = sum(2 * p.numel() for p in weights)
    assert len(weights) == 14 and all(p.dtype == torch.uint8 for p in weights)
    assert scale_bytes(nested) == count // 64 + 4 * count // (64 * 256) and scale_bytes(plain) == 4 * count // 64


def test_the_fields_reach_the_weights(base: Path):
    layer = quantised(base, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage="bfloat16").model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.quant_type == "fp4" and layer.weight.dtype == torch.bfloat16
    assert layer.compute_dtype == torch.bfloat16 and layer.weight.quant_state.nested


def test_a_quantised_model_is_not_trained_whole(base: Path, tmp_path: Path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
    save_model(model, tiny.tokenizer(), tmp_path / "nf4")
    assert is_quantised(model) and not is_quantised(load_model(base)[0])
    with pytest.raises(ValueError, match=r"nf4' is quantised, so its weights cannot train: give lora_r"):
        start(Sft(model=tmp_path / "nf4", dataset="d", output_dir=tmp_path / "out"))
    began = start(Sft(model=tmp_path / "nf4", dataset="d", output_dir=tmp_path / "out", lora_r=2))
    assert is_quantised(began.model)
    with pytest.raises(ValueError, match="load_in_4bit freezes the base model, so nothing would train: give lora_r"):
        Sft(model=base, dataset="d", output_dir="o", load_in_4bit=True)
