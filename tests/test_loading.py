"""Directories to models and back: what is missing is named, what is saved loads, and a killed save leaves no half."""

import copy
import json
import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import bitsandbytes
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fastpost as fp
import tiny
from fastpost.core.quantised import Quantised
from fastpost.models import attention
from fastpost.models.loading import load_model
from fastpost.models.lora import lora_config
from fastpost.models.probe import probe
from fastpost.models.qlora import four_bit_config
from fastpost.models.saving import save_model, written_aside
from fastpost.models.scalar import load_scored
from fastpost.models.trunk import hidden_states
from fastpost.packing import Example, pack
from rules import assert_gradient_close_to_truth

PACKED = pack([Example([5, 6, 7], [False, True, True]), Example([8, 9], [False, True])])


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "tiny"
    save_model(tiny.model("qwen3", hidden_size=64, intermediate_size=128, head_dim=16), tiny.tokenizer(), path)
    return path


def test_what_is_saved_loads_with_the_same_numbers(directory):
    model, tokenizer = load_model(directory)
    assert model.config._attn_implementation == attention.NAME
    save_model(model, tokenizer, directory.parent / "again")
    assert "fastpost" not in (directory.parent / "again" / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(directory.parent / "again")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name
    assert tokenizer("ab").input_ids == tiny.tokenizer()("ab").input_ids
    assert tokenizer.chat_template == tiny.TEMPLATE


def test_options_reach_the_model(directory):
    model, _ = load_model(directory, dtype="bfloat16", attn_implementation="eager", gradient_checkpointing=True)
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert model.model.layers[0].gradient_checkpointing
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_lora_trains_the_adapter_alone_and_saves_as_peft(directory):
    from peft import PeftModel

    model, tokenizer = load_model(
        directory, peft_config=lora_config(2, lora_alpha=4, lora_target_modules=["q_proj", "up_proj"])
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 8 and all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    save_model(model, tokenizer, directory.parent / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), directory.parent / "adapter")
    ours, theirs = hidden_states(model, PACKED), hidden_states(again, PACKED)
    torch.testing.assert_close(ours, theirs)
    with model.disable_adapter():
        assert (hidden_states(model, PACKED) - ours).norm() > 0.01 * ours.norm()


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_four_bits_hold_the_trunk_and_gradients_pass_them(directory, gradient_checkpointing):
    options = {"dtype": "bfloat16", "peft_config": lora_config(2), "gradient_checkpointing": gradient_checkpointing}
    model, _ = load_model(directory, quantization_config=four_bit_config(), **options)
    assert type(model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight).__name__ == "Params4bit"
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    plain, _ = load_model(directory, **options)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain.load_state_dict(adapter, strict=False)
    truth = gradients(copy.deepcopy(plain).double())
    assert_gradient_close_to_truth(gradients(model), gradients(plain), truth)


def test_a_checkpoint_that_is_quantised_already_loads_and_an_adapter_on_its_head_trains(directory):
    """bitsandbytes leaves the head out unless it is told otherwise."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[])
    quantised = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, quantization_config=config)
    quantised.save_pretrained(directory.parent / "nf4")
    tiny.tokenizer().save_pretrained(directory.parent / "nf4")
    model, _ = load_model(
        directory.parent / "nf4", peft_config=lora_config(2, lora_target_modules=["q_proj", "lm_head"])
    )
    head = fp.Head.of(model)
    assert isinstance(head.weight, Quantised) and head.weight.dtype == torch.float32  # bitsandbytes' own default
    hidden = hidden_states(model, PACKED)
    fp.linear_logprobs(hidden, head, PACKED.batch.target).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6 and all((g.norm() > 0) == ("lora_B" in name) for name, g in trained.items())


def gradients(model):
    """Of the adapter, after a forward pass in eval mode, as a rollout is."""
    with torch.no_grad():
        hidden_states(model.eval(), PACKED)
    hidden_states(model.train(), PACKED)[..., :20].float().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_what_is_missing_is_named(directory):
    for path, message in {
        directory.parent / "tyni": r"tyni' is no directory \(did you mean 'tiny'\?\)",
        directory.parent: "has no config.json: it is not a Hugging Face model directory",
        directory / "config.json": "config.json' is no directory",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_model(path)
    with pytest.raises(ValueError, match=r"dtype must be one of auto, .* got 'bfloat' \(did you mean 'bfloat16'\?\)"):
        load_model(directory, dtype="bfloat")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"tiny' could not be loaded: .*no file named model\.safetensors"):
        load_model(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_model(directory)


@pytest.mark.parametrize("load", [load_model, lambda path: load_scored(path, f"model {str(path)!r}", fresh=True)])
def test_weights_that_would_be_random_are_named(directory, load):
    tensors = load_file(directory / "model.safetensors")
    lost = [name for name in tensors if "layers.1.mlp" in name]
    assert len(lost) == 3
    save_file({n: x for n, x in tensors.items() if n not in lost}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="tiny' has not all of its weights, which would be random: no ") as refused:
        load(directory)
    assert all(name.partition("model.")[2] in str(refused.value) for name in lost)
    kept = [name for name in tensors if "layers.1" not in name]
    save_file({n: tensors[n] for n in kept}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"random: no .*, .*, .* and \d+ more$"):
        load(directory)


def test_a_name_that_the_hub_does_not_know_may_be_a_slip_of_a_path(directory, monkeypatch):
    monkeypatch.chdir(directory.parent.parent)
    monkeypatch.setattr("fastpost.models.loading.read_tokenizer", lambda *_, **__: {}["not on the hub"])
    with pytest.raises(ValueError, match=r"has no 'tyni' in it \(did you mean 'tiny'\?\): 'not on the hub'"):
        load_model(f"{directory.parent.name}/tyni")


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(directory):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(directory)
    with pytest.raises(ValueError, match="has 98 tokens, but the model embeds only 97"):
        load_model(directory)


def test_the_probe_leaves_the_model_as_it_was():
    model = tiny.model().train()
    state = torch.get_rng_state()
    probe(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_save_that_dies_leaves_the_old_files(directory):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(RuntimeError), written_aside(directory) as aside:
        (aside / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("killed")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert os.listdir(directory.parent) == ["tiny"]
    with pytest.raises(RuntimeError), written_aside(directory.parent / "new"):
        raise RuntimeError("killed")
    assert os.listdir(directory.parent) == ["tiny"]


def test_a_save_into_a_run_keeps_its_other_files_and_removes_stale_weights(directory):
    (directory / "metrics.jsonl").write_text("{}\n")
    (directory / "checkpoint-2").mkdir()
    (directory / "checkpoint-2" / "model.safetensors").write_text("kept")
    with written_aside(directory) as aside:
        for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json"):
            (aside / name).write_text(json.dumps(name))
    assert (directory / "metrics.jsonl").exists() and (directory / "checkpoint-2" / "model.safetensors").exists()
    assert (directory / "model.safetensors.index.json").exists() and not (directory / "model.safetensors").exists()
    assert os.listdir(directory.parent) == ["tiny"]
