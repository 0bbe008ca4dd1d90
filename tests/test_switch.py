"""A switch leaves no trace: not after an error, not in requires_grad, and not in a layer that backward runs again."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import get_peft_model
from torch.utils.checkpoint import checkpoint

from fastpost.models.switch import Switch
from fastpost.models.trunk import hidden_states
from role_models import PACKED, base, checkpointed, learnt, lora, same


def two(dropout=0.0, checkpointing=False, **changes):
    """A base with the adapters `one` and `other`, which both train."""
    model = get_peft_model(base(), lora(dropout=dropout, **changes), adapter_name="one")
    model.add_adapter("other", lora(dropout=dropout, **changes))
    model.set_requires_grad(["one", "other"])
    checkpointed(learnt(model).get_base_model()) if checkpointing else learnt(model)
    return model.train()


def trace(model):
    """All that a switch could leave behind."""
    switch = Switch.of(model)
    adapters = [(layer.active_adapters, layer.disable_adapters) for layer in switch.layers]
    modes = [module.training for module in model.modules()]
    return adapters, modes, {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


def loss_of(switch, adapter):
    """(A sum of squares would hardly depend on anything: there is a norm before it.)"""
    with switch.using(adapter):
        return hidden_states(switch.model, PACKED).sin().sum()


def gradients(model):
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_every_layer_has_the_adapter_and_only_inside(changes):
    model = two(**changes)
    switch, before = Switch.of(model), trace(model)
    assert len(switch.layers) == 2 * 7 + len(changes.get("modules_to_save", ()))
    for adapter in ("other", "one", None):
        with switch.using(adapter, training=False):
            for layer in switch.layers:
                assert layer.disable_adapters if adapter is None else layer.active_adapters == [adapter]
            assert not any(module.training for module in model.modules())
            assert trace(model)[2] == before[2]
        assert trace(model) == before


def test_it_goes_back_through_nesting_and_errors():
    model = two()
    model.eval()
    model.get_base_model().model.layers[0].train()
    switch, before = Switch.of(model), trace(model)
    with pytest.raises(RuntimeError, match="inside"), switch.using("other", training=False):
        within = trace(model)
        with switch.using(None), switch.using("one", training=True):
            assert switch.layers[0].active_adapters == ["one"] and model.training
        assert trace(model) == within
        raise RuntimeError("inside")
    assert trace(model) == before


def test_a_module_that_only_one_adapter_trains_whole_is_the_bases_own_for_the_other():
    model = get_peft_model(base(), lora(modules_to_save=["embed_tokens"]), adapter_name="one")
    model.add_adapter("other", lora())
    embedding = model.get_base_model().model.embed_tokens
    torch.nn.init.ones_(embedding.modules_to_save["one"].weight)
    switch = Switch.of(model)
    for adapter, weight in (("other", embedding.original_module.weight), ("one", torch.ones(97, 32))):
        with switch.using(adapter):
            assert torch.equal(embedding.weight, weight)
            assert torch.equal(embedding(PACKED.input_ids), weight[PACKED.input_ids])


def test_an_adapter_that_is_off_draws_no_dropout():
    model = get_peft_model(base(), lora(dropout=0.5), adapter_name="one")
    model.add_adapter("other", lora())
    switch = Switch.of(model.train())
    with switch.using("other"):
        state = torch.get_rng_state()
        hidden_states(model, PACKED)
        assert torch.equal(torch.get_rng_state(), state)
    with switch.using("one"):
        hidden_states(model, PACKED)
        assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("around", [None, "one", "other", "base in eval"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_recomputed_layer_has_the_adapters_of_its_forward(around, dropout):
    """Whatever is on when backward runs, and both adapters in one backward."""
    plain, noted = two(dropout), two(dropout, checkpointing=True)
    noted.load_state_dict(plain.state_dict())
    found = []
    for model in (plain, noted):
        switch = Switch.of(model)
        torch.manual_seed(1)
        loss = loss_of(switch, "other") + 2 * loss_of(switch, "one")
        before = trace(model)
        outside = {"base in eval": switch.using(None, training=False), None: nullcontext()}
        with outside[around] if around in outside else switch.using(around):
            loss.backward()
        assert trace(model) == before
        found.append(gradients(model))
    assert same(*found)
    assert all(g.norm() > 0 for g in found[0])


def test_without_the_note_a_recomputed_layer_has_the_wrong_adapter():
    """That the test above can fail."""
    plain, forgetful = two(), two(checkpointing=True)
    forgetful.load_state_dict(plain.state_dict())
    loss_of(Switch.of(plain), "other").backward()
    switch = Switch.of(forgetful)
    with switch.using("other"):
        for module in switch.checkpointable:
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        loss = hidden_states(forgetful, PACKED).sin().sum()
    loss.backward()
    assert not same(gradients(forgetful), gradients(plain))


def test_a_graph_that_is_retained_is_recomputed_twice():
    plain, noted = two(), two(checkpointing=True)
    noted.load_state_dict(plain.state_dict())
    for model in (plain, noted):
        loss = loss_of(Switch.of(model), "other")
        loss.backward(retain_graph=True)
        loss.backward()
    assert same(gradients(noted), gradients(plain))


def test_checkpointing_may_be_turned_on_and_changed_later():
    plain, noted = two(), two()
    noted.load_state_dict(plain.state_dict())
    switch = Switch.of(noted)
    loss_of(switch, "one")
    for _ in range(2):
        checkpointed(noted.get_base_model())
        loss_of(switch, "other").backward()
        loss_of(Switch.of(plain), "other").backward()
        assert same(gradients(noted), gradients(plain))


def test_a_copy_of_a_model_that_notes_has_notes_of_its_own():
    model = two(checkpointing=True)
    with Switch.of(model).using("one"):
        copied = copy.deepcopy(model)
    for each in (model, copied):
        loss_of(Switch.of(each), "other").backward()
    assert same(gradients(copied), gradients(model))


def test_a_part_that_was_in_eval_mode_is_recomputed_in_eval_mode():
    plain, noted = two(dropout=0.4), two(dropout=0.4, checkpointing=True)
    noted.load_state_dict(plain.state_dict())
    for model in (plain, noted):
        quiet = model.get_base_model().model.layers[1].mlp.eval()
        torch.manual_seed(1)
        loss = loss_of(Switch.of(model), "other")
        quiet.train()
        loss.backward()
    assert same(gradients(noted), gradients(plain))


def test_checkpointing_that_cannot_note_is_refused():
    model = two()
    for keywords in ({"use_reentrant": True}, {"use_reentrant": False, "context_fn": nullcontext}):
        model.get_base_model().gradient_checkpointing_enable(keywords)
        with pytest.raises(ValueError, match="must be non-reentrant and have no context_fn of its own"):
            loss_of(Switch.of(model), "one")


def test_a_merged_adapter_is_refused():
    model = two()
    model.merge_adapter(["one"])
    with pytest.raises(ValueError, match="an adapter is merged into its base"):
        Switch.of(model)


def test_the_parameters_of_an_adapter_are_those_that_its_name_is_on():
    model = two(use_dora=True, modules_to_save=["lm_head"], target_modules=["q_proj", "embed_tokens"])
    named = {name: p for name, p in model.named_parameters() if ".one." in name or name.endswith(".one")}
    assert {id(p) for p in Switch.of(model).parameters("one")} == {id(p) for p in named.values()}
    assert {name.split(".one")[0].rpartition(".")[2] for name in named} == {
        *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "modules_to_save")
    }


def test_peft_itself_would_have_changed_what_trains():
    """Why there is a switch of our own; the day this fails, there need not be one."""
    model = two()
    before = trace(model)[2]
    model.set_adapter("one")
    assert trace(model)[2] != before
