"""liger-kernel in the trunk: which modules get its forward, what is put back, where it is refused. Nothing is run."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("liger_kernel")
pytest.importorskip("peft")

from transformers.models.llama import modeling_llama

import tiny
from fastpost.integrations.liger import apply_liger
from fastpost.models import memory
from fastpost.models.lora import lora_config, with_lora
from fastpost.models.trunk import causal_lm


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one; and what liger changes for good is changed back."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_norms_mlps_and_the_rotary_embedding_are_ligers_and_the_head_is_not(lora: bool):
    classes = {name: value for name, value in vars(modeling_llama).items() if isinstance(value, type)}
    rotary = modeling_llama.apply_rotary_pos_emb
    model = tiny.model("llama")
    model = with_lora(model, lora_config(2)) if lora else model
    apply_liger(model)
    lm = causal_lm(model)
    theirs = {
        name for name, m in lm.named_modules() if vars(m).get("forward", m.forward).__module__.startswith("liger")
    }
    layers = [f"model.layers.{i}." for i in (0, 1)]
    kinds = ("input_layernorm", "post_attention_layernorm", "mlp")
    assert theirs == {"model.norm"} | {layer + kind for layer in layers for kind in kinds}
    assert "forward" not in vars(lm) and "forward" not in vars(lm.lm_head)
    assert modeling_llama.apply_rotary_pos_emb is not rotary
    assert {name: vars(modeling_llama)[name] for name in classes} == classes  # a model to come is not changed


@pytest.mark.usefixtures("gpu")
def test_tiles_go_around_ligers_mlp_and_come_off():
    model = tiny.model("llama")
    apply_liger(model)
    mlp = model.model.layers[0].mlp
    theirs = mlp.forward
    memory.tile_mlps(model, 4)
    assert mlp.forward.args[-2:] == (theirs, 4)
    memory.undo(model)
    assert mlp.forward == theirs


@pytest.mark.usefixtures("gpu")
def test_a_family_that_liger_does_not_know_is_named():
    with pytest.raises(ValueError, match="use_liger_kernel: liger-kernel has none for the model type 'phi'"):
        apply_liger(tiny.model("phi"))


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="use_liger_kernel puts Triton kernels into the model, which run on a GPU"):
        apply_liger(tiny.model("llama"))
