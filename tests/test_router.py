"""The router's loss of a mixture of experts over a pack: transformers' own on the padded batch with its mask."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

import decoders
import fastpost as fp
import tiny
from decoders import MIXTURES, Doubles
from fastpost.models import attention, router
from fastpost.models.trunk import hidden_states, hidden_states_and_router_loss
from fastpost.packing import pack
from fastpost.shared_prompt import share_prompts
from fastpost.trainers.config import Sft
from fastpost.trainers.sft import backward
from test_packed_attention import LENGTHS, assert_equal_to_rounding
from test_shared_prompt import UNITS, repeated


@pytest.fixture(autouse=True)
def registered():
    attention.register()


def padded_loss(model, rows):
    model.set_attn_implementation("eager")
    ids, mask = decoders.padded(rows)
    return model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True).aux_loss


@pytest.mark.parametrize("shared", [False, True], ids=["packed", "shared"])
@pytest.mark.parametrize("family", MIXTURES)
def test_the_loss_is_that_of_the_padded_batch(family, shared):
    model, rows = decoders.model(family), repeated() if shared else decoders.examples(LENGTHS)
    packed = share_prompts(pack(rows), UNITS) if shared else pack(rows)
    with Doubles():
        truth = padded_loss(model, rows)
        true_gradients = decoders.gradients(model, truth)
        model.set_attn_implementation(attention.NAME)
        hidden, ours = hidden_states_and_router_loss(model, packed)
        assert_equal_to_rounding({"loss": ours}, {"loss": truth})
        assert_equal_to_rounding(decoders.gradients(model, ours), true_gradients)
        assert torch.equal(hidden, hidden_states(model, packed))
    assert any(gradient.any() for gradient in true_gradients.values())


def test_what_is_counted_matters():
    """Padding among the tokens, or a shared prompt that counts once, would be another loss."""
    model, rows = decoders.model("mixtral", torch.float32), repeated()
    shared = share_prompts(pack(rows), UNITS)
    model.set_attn_implementation(attention.NAME)
    truth = hidden_states_and_router_loss(model, shared)[1]
    once = hidden_states_and_router_loss(model, replace(shared, copies=torch.ones_like(shared.copies)))[1]
    ids, _ = decoders.padded(rows)
    unmasked = model(input_ids=ids, use_cache=False, output_router_logits=True).aux_loss
    assert abs(once - truth) > 1e-3 * truth and abs(unmasked - truth) > 1e-3 * truth


def test_gradient_checkpointing_changes_nothing():
    model, packed = decoders.model("qwen3_moe").train(), pack(decoders.examples(LENGTHS))
    model.set_attn_implementation(attention.NAME)
    plain = decoders.gradients(model, hidden_states_and_router_loss(model, packed)[1])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = decoders.gradients(model, hidden_states_and_router_loss(model, packed)[1])
    assert any(gradient.any() for gradient in plain.values())
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_the_coefficient_is_the_configs_and_a_dense_model_has_none():
    for coefficient in (0.01, 0.0):
        model = tiny.model("mixtral", num_local_experts=4, router_aux_loss_coef=coefficient)
        assert router.coefficient(model) == coefficient
        assert router.coefficient(model, 0.5) == 0.5
        model.__class__ = type("Wrapped", (type(model),), {"__module__": "elsewhere"})  # as FSDP2 does
        assert router.coefficient(model) == coefficient
    dense = tiny.model("llama")
    assert router.coefficient(dense) == router.coefficient(dense, 0.0) == 0
    with pytest.raises(
        ValueError, match=r"router_aux_loss_coef must be 0 .* for LlamaForCausalLM, which has no router"
    ):
        router.coefficient(dense, 0.01)
    with pytest.raises(ValueError, match="no router's loss of LlamaForCausalLM"):
        hidden_states_and_router_loss(dense, pack(decoders.examples([3])))


@pytest.mark.parametrize("listed", [True, False], ids=["output_router_logits on", "off"])
def test_the_coefficient_is_trls_whatever_the_model_would_return(tmp_path, listed):
    pytest.importorskip("trl")
    from trl_trainers import trainer_of

    model = tiny.model("mixtral", num_local_experts=4, output_router_logits=listed)
    ours = router.coefficient(model)
    trainer = trainer_of("sft", tmp_path, lambda: model)
    assert trainer.aux_loss_enabled and ours == trainer.router_aux_loss_coef == 0.001


@pytest.mark.parametrize("asked", [None, 0.5, 0.0])
def test_a_step_of_sft_adds_it_by_each_packs_share_of_tokens(tmp_path, asked):
    """Two packs of the step: the gradient is that of the token loss and, by tokens, of each pack's router loss."""
    rows = decoders.examples([9, 4, 12, 7])
    model = decoders.model("qwen3_moe", torch.float32, router_aux_loss_coef=0.25)
    model.set_attn_implementation(attention.NAME)
    config = Sft(
        model="unread",
        dataset="unread",
        output_dir=tmp_path,
        per_device_train_batch_size=2,
        router_aux_loss_coef=asked,
    )
    tokens, predicted = sum(len(row.input_ids) for row in rows), sum(len(row.predicted) for row in rows)
    truth, aux_loss = 0.0, 0.0
    for packed in (pack(rows[:2]), pack(rows[2:])):
        hidden, balance = hidden_states_and_router_loss(model, packed)
        logp = fp.linear_logprobs(hidden[0], fp.Head.of(model), packed.batch.target)
        share = packed.input_ids.numel() / tokens
        aux_loss = aux_loss + share * balance.detach()
        truth = truth - logp.sum() / predicted + (0.25 if asked is None else asked) * share * balance
    expected = decoders.gradients(model, truth.reshape(1), coefficients=torch.ones(1))
    model.zero_grad()
    values = backward(model, rows, config)
    assert ("aux_loss" in values) == (asked != 0.0)
    if asked != 0.0:
        torch.testing.assert_close(torch.tensor(values["aux_loss"]), aux_loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
