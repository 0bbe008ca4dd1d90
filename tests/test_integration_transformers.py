"""fuse_head: a model's own loss, statistics and gradients without its logits, and without labels the model itself.

The truth is the same model in float64 with its logits in memory; the yardstick is the same in fp32 (tests/rules.py).
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import tiny
from fastpost.integrations.transformers import FusedOutput, fuse_head
from flops import products
from rules import assert_close_to_truth, assert_gradient_close_to_truth

V, D = tiny.SHAPE["vocab_size"], tiny.SHAPE["hidden_size"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "experts_implementation": "eager"}
FAMILIES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "gemma2": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "granite": ("granite", {"logits_scaling": 3.0}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "head_dim": 8}),
    "phi": ("phi", {}),  # its head has a bias
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {}),
    "falcon_h1": ("falcon_h1", {"lm_head_multiplier": 0.3, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64}),
}
MIXTURES = {
    "mixtral": ("mixtral", {"num_local_experts": 4, **ROUTED}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 16, **ROUTED}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 8, **ROUTED}),
    "olmoe": ("olmoe", {**EXPERTS, **ROUTED}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "logits_scaling": 3.0, **ROUTED}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "head_dim": 8, **ROUTED}),
    "phimoe": ("phimoe", {"num_local_experts": 4, **ROUTED}),
    "jetmoe": ("jetmoe", {"num_local_experts": 4, "kv_channels": 8, "output_router_logits": True}),
    "minimax_m2": ("minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, **ROUTED}),
}


def batch() -> dict[str, Tensor]:
    """Three padded sequences with prompts, one of them all prompt; six rows have a label."""
    ids = torch.randint(5, V, (3, 9))
    lengths = torch.tensor([[9], [6], [4]])
    mask = (torch.arange(9) < lengths).long()
    labels = ids.masked_fill((torch.arange(9) < torch.tensor([[5], [4], [9]])) | (mask == 0), -100)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def next_labels(labels: Tensor) -> Tensor:
    return pad(labels[:, 1:], (0, 1), value=-100)


def plain(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(loss, logp) from the model's own logits, in its own dtype: transformers' loss rounds them to fp32."""
    out = model(**inputs)
    target = next_labels(inputs["labels"])
    logp = out.logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    logp = torch.where(target == -100, 0.0, logp)
    nll = -logp.sum() / (target != -100).sum()
    if getattr(out, "aux_loss", None) is not None:
        nll = nll + getattr(model, "router_aux_loss_coef", getattr(model, "aux_loss_coef", None)) * out.aux_loss
    torch.testing.assert_close(nll.float(), out.loss.float())
    return nll, logp


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def refuse_to_run(module: nn.Module, *_: object) -> None:
    raise AssertionError("the head ran")


@pytest.mark.parametrize("name", [*FAMILIES, *MIXTURES])
def test_loss_logp_and_every_gradient_are_the_models_own(name):
    family, changes = (FAMILIES | MIXTURES)[name]
    model, inputs = tiny.model(family, **changes), batch()
    double = copy.deepcopy(model).double()
    yardstick, yardstick_logp = plain(model, inputs)
    yardsticks = gradients(model, yardstick)
    truth, true_logp = plain(double, inputs)
    truths = gradients(double, truth)
    with fuse_head(model) as fused, fuse_head(double):
        fused.lm.get_output_embeddings().register_forward_pre_hook(refuse_to_run)
        out, exact = model(**inputs), double(**inputs)
        assert out.logits is None
        assert (out.aux_loss is None) == (name in FAMILIES)
        assert_close_to_truth(out.loss, yardstick, truth, "loss")
        assert_close_to_truth(out.logp, yardstick_logp, true_logp, "logp")
        torch.testing.assert_close(exact.logp, true_logp)
        torch.testing.assert_close(exact.loss, truth)
        grads = gradients(model, out.loss)
    assert grads.keys() == yardsticks.keys() == truths.keys()
    for leaf, gradient in grads.items():
        assert_gradient_close_to_truth(gradient, yardsticks[leaf], truths[leaf], f"d loss / d {leaf}")


@pytest.mark.parametrize("train_head", [True, False])
def test_only_rows_with_a_label_reach_the_head(train_head):
    model, inputs = tiny.model(), batch()
    model.lm_head.requires_grad_(train_head)
    rows = int((next_labels(inputs["labels"]) != -100).sum())
    assert rows == 6

    def flops(labels: Tensor) -> int:
        return products(lambda: model(**inputs | {"labels": labels}).loss)

    with fuse_head(model):
        head = flops(inputs["labels"]) - flops(torch.full_like(inputs["labels"], -100))
    assert head == (3 if train_head else 2) * 2 * rows * D * V


def test_every_statistic_rides_along():
    model, inputs = tiny.model().double(), batch()
    target, kept = next_labels(inputs["labels"]), next_labels(inputs["labels"]) != -100
    logits = model(**inputs).logits / 0.7
    everything = ("logp", "lse", "entropy", "log_sum_sq", "mean_logp", "top1", "logp@1")
    with fuse_head(model, outputs=everything, temperature=0.7):
        out = model(**inputs)
    log_p = logits.log_softmax(-1)
    logp = log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    at_1 = (0.7 * logits).log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    truths = {
        "logp": logp,
        "lse": logits.logsumexp(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq": (2 * log_p).logsumexp(-1),
        "mean_logp": log_p.mean(-1),
        "logp_at_1": at_1,
    }
    for field, truth in truths.items():
        torch.testing.assert_close(out[field], torch.where(kept, truth, 0.0), msg=field)
        assert not out[field].requires_grad
    assert torch.equal(out.top1, (logp == log_p.amax(-1)) & kept)
    torch.testing.assert_close(out.loss, -logp[kept].mean())


@pytest.mark.parametrize("outputs", [("logp",), ("logp", "entropy"), ("entropy",), ()])
def test_differentiable_statistics_make_a_loss_of_ones_own(outputs):
    model, inputs = tiny.model().double(), batch()
    target = next_labels(inputs["labels"])
    log_p = model(**inputs).logits.log_softmax(-1)
    stats = {
        "logp": log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
    }
    weight = torch.where(target == -100, 0.0, torch.randn(target.shape, dtype=torch.float64))
    own = sum(((weight * stats[name]).sum() for name in outputs), torch.zeros(()))
    truths = gradients(model, own - stats["logp"][target != -100].mean())
    with fuse_head(model, outputs=outputs, differentiable=True):
        out = model(**inputs)
        grads = gradients(model, out.loss + sum((weight * out[name]).sum() for name in outputs))
    for name, truth in truths.items():
        torch.testing.assert_close(grads[name], truth, msg=name)


def test_without_labels_the_model_is_itself():
    model, inputs = tiny.model(), batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    calls = (
        lambda: model(ids).logits,
        lambda: model(ids, attention_mask=mask, logits_to_keep=1).logits,
        lambda: model(ids, mask, return_dict=False)[0],
        lambda: model.generate(ids[:1], max_new_tokens=5, do_sample=False),
        lambda: model.generate(ids[:1], max_new_tokens=5, num_beams=2, do_sample=False),
    )
    truths, signature = [call() for call in calls], inspect.signature(model.forward)
    with fuse_head(model):
        assert all(torch.equal(call(), truth) for call, truth in zip(calls, truths, strict=True))
        assert inspect.signature(model.forward) == signature
        assert model.forward.__doc__ == type(model).forward.__doc__


def test_the_forms_of_a_call():
    model, inputs = tiny.model(), batch()
    ids, labels = inputs["input_ids"], inputs["labels"]
    truth = model(**inputs, output_hidden_states=True)
    with fuse_head(model, outputs=("logp", "top1")):
        out = model(ids, inputs["attention_mask"], labels=labels, output_hidden_states=True)
        loss, logp, top1, cache, hidden = model(**inputs, output_hidden_states=True, return_dict=False)
        shifted = model(**inputs | {"labels": ids}, shift_labels=next_labels(labels))
        other = model(**inputs | {"labels": labels.masked_fill(labels == -100, 1)}, ignore_index=1)
        embedded = model(
            inputs_embeds=model.get_input_embeddings()(ids), attention_mask=inputs["attention_mask"], labels=labels
        )
        halved = [model(**inputs, num_items_in_batch=n).loss for n in (12, torch.tensor(12), torch.tensor([12.0]))]
    assert isinstance(out, FusedOutput)
    torch.testing.assert_close(out.loss, truth.loss)
    for same in (loss, shifted.loss, other.loss, embedded.loss, *(2 * x for x in halved)):
        torch.testing.assert_close(same, out.loss)
    assert torch.equal(logp, out.logp) and torch.equal(top1, out.top1)
    assert torch.equal(hidden[-1], truth.hidden_states[-1])
    assert cache.get_seq_length() == out.past_key_values.get_seq_length() == 9


def test_a_batch_without_labels_left_is_zero_and_connected():
    model, inputs = tiny.model(), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert model(**inputs).loss.isnan()
    for differentiable in (False, True):
        with fuse_head(model, differentiable=differentiable):
            for items in ({}, {"num_items_in_batch": torch.tensor(7)}, {"num_items_in_batch": torch.tensor(0)}):
                loss = model(**inputs, **items).loss
                assert loss == 0
                grads = gradients(model, loss)
                assert grads.keys() == dict(model.named_parameters()).keys()
                assert all(not gradient.any() for gradient in grads.values())


@pytest.mark.parametrize("how", ["module", "in place"])
def test_a_compiled_model_runs(how):
    model, inputs = tiny.model(), batch()
    truth = model(**inputs)
    truths = gradients(model, truth.loss)
    if how == "in place":
        model.compile(backend="eager")
    compiled = model if how == "in place" else torch.compile(model, backend="eager")
    with fuse_head(compiled) as fused:
        assert fused.lm is model
        grads = gradients(model, compiled(**inputs).loss)
        assert compiled(**inputs).logits is None
    assert grads.keys() == truths.keys()
    for name, truth in truths.items():
        torch.testing.assert_close(grads[name], truth, msg=name)
    assert compiled(**inputs).logits is not None


def test_gradient_checkpointing_changes_nothing():
    model, inputs = tiny.model().train(), batch()
    with fuse_head(model):
        truths = gradients(model, model(**inputs).loss)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, gradient in gradients(model, model(**inputs).loss).items():
            assert torch.equal(gradient, truths[name]), name


def adapted(config: Any) -> Any:
    """A tiny Llama with an adapter that no longer adds zero."""
    model = peft.get_peft_model(tiny.model(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "lora on the head": lambda: peft.LoraConfig(**LORA | {"target_modules": ["q_proj", "lm_head"]}),
    "modules_to_save": lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("order", ["adapter first", "fused first"])
def test_adapters_train_as_they_would(name, order):
    model, inputs = adapted(ADAPTERS[name]()), batch()
    truth = model(**inputs)
    truths = gradients(model, truth.loss)
    handle = fuse_head(model if order == "adapter first" else model.get_base_model())
    out = model(**inputs)
    grads = gradients(model, out.loss)
    assert out.logits is None
    torch.testing.assert_close(out.loss, truth.loss)
    assert grads.keys() == truths.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for leaf, gradient in grads.items():
        torch.testing.assert_close(gradient, truths[leaf], msg=leaf)
    if name != "prompt tuning":
        with model.disable_adapter():
            reference = model(**inputs).logp
        assert not torch.equal(reference, out.logp)
        torch.testing.assert_close(reference, plain(tiny.model(), inputs)[1])
    handle.restore()
    assert all("forward" not in module.__dict__ for module in model.modules())
