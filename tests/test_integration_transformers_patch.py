"""fuse_head as a patch: it leaves no trace, suits what else wraps a forward, and refuses what it cannot replace."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import accelerate
import torch
import transformers
from torch import nn

import tiny
from fastpost.integrations.transformers import fuse_head
from test_integration_transformers import V, batch


def test_restore_leaves_no_trace():
    model, inputs = tiny.model(), batch()
    before = dict(model.__dict__)
    handle = fuse_head(model)
    with handle:
        assert model(**inputs).logits is None
    assert model.__dict__ == before and "forward" not in model.__dict__
    assert model(**inputs).logits is not None
    handle.restore()
    with pytest.raises(RuntimeError, match="mine"), fuse_head(model):
        raise RuntimeError("mine")
    assert model.__dict__ == before


def test_a_second_call_replaces_the_first():
    model, inputs = tiny.model(), batch()
    first = fuse_head(model)
    second = fuse_head(model, outputs=("entropy",))
    assert model(**inputs).keys() >= {"loss", "entropy"} and model(**inputs).logp is None
    first.restore()
    assert model(**inputs).entropy is not None
    second.restore()
    assert "forward" not in model.__dict__


def test_a_forward_that_was_there_before_is_called_and_put_back():
    model, inputs = tiny.model(), batch()
    calls, own = [], model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(sorted(kwargs))
        return own(*args, **kwargs)

    model.forward = forward
    with fuse_head(model):
        calls.clear()
        model(**inputs)
        assert calls == []
        model(inputs["input_ids"], use_cache=False)
        assert calls == [["use_cache"]]
    assert model.forward is forward


def test_a_forward_that_accelerate_has_wrapped_passes_through_and_can_be_fused_again():
    model, inputs = tiny.model(), batch()
    handle = fuse_head(model)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert prepared is model and model(**inputs).logits is None
    handle.restore()
    theirs = model(**inputs)
    assert theirs.logits is not None
    with fuse_head(model, outputs=("entropy",)):
        ours = model(**inputs)
        assert ours.entropy is not None
        handle.restore()  # replaced since: nothing happens
        assert model(**inputs).entropy is not None
        # Autocast rounds the logits to bf16 in theirs; hidden states are the same in both.
        assert (ours.loss - theirs.loss).abs() < torch.finfo(torch.bfloat16).eps * theirs.logits.abs().max()
    assert model(**inputs).logits is not None


def test_a_forward_that_accelerate_wrapped_first_is_refused():
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(tiny.model())
    forward = model.forward
    with pytest.raises(ValueError, match=r"call fuse_head before accelerator\.prepare"):
        fuse_head(model)
    assert model.forward is forward


def test_accelerate_takes_its_own_wrapper_off_and_not_ours():
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, inputs = tiny.model(), batch()
    handle = fuse_head(model)
    model = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)
    assert model(**inputs).logits is None
    handle.restore()
    assert "forward" not in model.__dict__


def test_a_copy_is_fused_and_its_own():
    model, inputs = tiny.model(), batch()
    with fuse_head(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight.zero_()
        torch.testing.assert_close(other(**inputs).loss, torch.tensor(float(V)).log())
        assert model(**inputs).loss > 4.7


def test_a_saved_model_is_what_it_was(tmp_path):
    model, inputs = tiny.model(), batch()
    truth = model(**inputs).logits
    with fuse_head(model):
        model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(**inputs).logits, truth)


def test_modes_are_left_as_they_were():
    model = tiny.model("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with fuse_head(model):
        assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_arguments_are_refused_by_name():
    model = tiny.model()
    for arguments, message in (
        ({"outputs": ("entropie",)}, r"unknown output 'entropie' \(did you mean 'entropy'\?\); known: logp, lse"),
        ({"outputs": "logits"}, "unknown output 'logits'"),
        ({"outputs": ("reverse_kl",)}, "outputs: 'reverse_kl' compares with a reference"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"label_smoothing": 1.5}, r"label_smoothing must .*got 1\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse_head(model, **arguments)
        assert "forward" not in model.__dict__


def test_bad_calls_are_refused_by_name():
    model, inputs = tiny.model(), batch()
    with fuse_head(model):
        with pytest.raises(ValueError, match="logits_to_keep came with labels"):
            model(**inputs, logits_to_keep=1)
        with pytest.raises(ValueError, match=r"labels \(3, 8\) must have the shape of the input, \(3, 9\)"):
            model(**inputs | {"labels": inputs["labels"][:, 1:]})
        with pytest.raises(TypeError, match="positional arguments"):
            model(*range(20))


def test_models_it_cannot_stand_in_for_are_refused():
    seq2seq = transformers.T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    refused = (
        (transformers.T5ForConditionalGeneration(seq2seq), "takes a decoder .* got T5ForConditionalGeneration"),
        (tiny.model("bert", is_decoder=True), "BertLMHeadModel keeps its output embedding inside another module"),
        (tiny.model().model, "takes a Hugging Face causal LM, got LlamaModel"),
        (nn.Linear(2, 2), "takes a Hugging Face causal LM, got Linear"),
        (nn.DataParallel(tiny.model()), "one process a device"),
        (
            tiny.model("doge", num_experts=16, num_experts_per_tok=2, is_moe=True, output_router_logits=True),
            "how DogeForCausalLM computes",
        ),
    )
    for model, message in refused:
        with pytest.raises(ValueError, match=message):
            fuse_head(model)
        assert all("forward" not in module.__dict__ for module in model.modules())


def test_logits_that_are_widened_once_they_are_rounded_are_no_other_ones():
    model, inputs = tiny.model().bfloat16(), batch()
    own = model.forward

    def widened(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        return transformers.modeling_outputs.CausalLMOutput(loss=out.loss, logits=out.logits.float())

    model.forward = widened
    with fuse_head(model):
        assert model(**inputs).logits is None
    assert not model.lm_head._forward_hooks


def test_a_loss_of_the_models_own_is_noticed():
    model = tiny.model()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM computes its loss otherwise than fuse_head would: .* or this loss_function"
    ):
        fuse_head(model)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_head_that_is_another_one_is_noticed_in_every_dtype(dtype, monkeypatch):
    model = tiny.model("granite", logits_scaling=3.0).to(dtype)
    fuse_head(model).restore()
    monkeypatch.setattr("fastpost.models.heads.DIVIDE", ())
    with pytest.raises(ValueError, match="fastpost does not know this architecture"):
        fuse_head(model)
