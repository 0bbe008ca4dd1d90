"""Adapters: which layers get them, what kinds there are, embeddings that are tied to the head, and merging."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("peft")

from transformers import AutoModelForCausalLM

import fastpost as fp
import tiny
from fastpost.models.adapters import load_adapter
from fastpost.models.loading import load_model
from fastpost.models.lora import beside_tied, lora_config, with_lora
from fastpost.models.merging import merged
from fastpost.models.saving import save_model
from fastpost.models.trunk import hidden_states
from fastpost.packing import Example, pack
from rules import assert_close_to_truth, assert_gradient_close_to_truth

IDS = torch.arange(5, 29)[None]
ENDS = ["lm_head", "embed_tokens"]
KINDS = {
    "all linear": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "head and embedding": {"lora_target_modules": ["all-linear", *ENDS]},
    "head": {"lora_target_modules": ["q_proj", "lm_head"]},
    "embedding": {"lora_target_modules": ["q_proj", "embed_tokens"]},
    "head trained whole": {"lora_modules_to_save": ["lm_head"]},
    "both trained whole": {"lora_modules_to_save": ENDS},
}


def adapted(kind: str = "all linear", **changes):
    """A model with an adapter that has been somewhere, in eval mode."""
    model = with_lora(tiny.model("qwen3", **changes), lora_config(3, lora_alpha=4, **KINDS[kind]))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def logits(model) -> Tensor:
    return model(IDS, use_cache=False).logits[0]


# ---- which layers ----


def targeted(names, family: str = "qwen3") -> set[str]:
    found = with_lora(tiny.model(family), lora_config(2, lora_target_modules=names)).targeted_module_names
    return {name.rpartition(".")[2] for name in found}


def test_all_linear_layers_are_all_but_the_head_which_can_be_named_beside_them():
    linear = {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    assert targeted("all-linear") == targeted(["all-linear"]) == linear
    assert targeted(["all-linear", *ENDS]) == linear | set(ENDS)
    assert targeted(r".*\.(q|v)_proj") == {"q_proj", "v_proj"}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft's, of Conv1D
def test_all_linear_means_the_same_layers_of_gpt2_beside_other_names_too():
    linear = {"c_attn", "c_proj", "c_fc"}  # Conv1D, which is no nn.Linear
    assert targeted("all-linear", "gpt2") == linear
    assert targeted(["all-linear", "lm_head"], "gpt2") == linear | {"lm_head"}


def test_a_name_that_no_layer_has_is_refused_beside_names_that_fit():
    for field in ("lora_target_modules", "lora_modules_to_save"):
        config = lora_config(2, **({"lora_target_modules": ["q_proj"]} | {field: ["k_proj", "q_porj"]}))
        with pytest.raises(ValueError, match=rf"{field} has 'q_porj', which no layer .*did you mean 'q_proj'"):
            with_lora(tiny.model("qwen3"), config)
    with pytest.raises(ValueError, match="lora_target_modules 'nope' do not fit Qwen3ForCausalLM"):
        with_lora(tiny.model("qwen3"), lora_config(2, lora_target_modules="nope"))


def test_what_a_config_cannot_be():
    with pytest.raises(ValueError, match=r"lora_r must be positive, .* got 0"):
        lora_config(0)
    with pytest.raises(ValueError, match=r"init_lora_weights must be one of .* got 'pissa': others change the base"):
        lora_config(2, init_lora_weights="pissa")


# ---- kinds ----


def test_rank_stabilised_adapters_are_scaled_by_the_root():
    scaling = {kind: adapted(kind).get_base_model().model.layers[0].mlp.up_proj.scaling for kind in list(KINDS)[:3]}
    assert scaling["all linear"] == scaling["DoRA"] == {"default": 4 / 3}
    assert scaling["rank-stabilised"] == {"default": 4 / 3**0.5}


def test_dora_trains_a_length_of_each_output_and_is_refused_on_the_head():
    model = adapted("DoRA")
    lengths = {name for name, p in model.named_parameters() if "magnitude" in name and p.requires_grad}
    assert len(lengths) == 14
    config = lora_config(2, use_dora=True, lora_target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"the head carries DoraLinearVariant, .* leave the head out"):
        fp.Head.of(with_lora(tiny.model("qwen3"), config))


@pytest.mark.parametrize("tied", [False, True], ids=["own weights", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_gets_the_gradient_of_the_models_own_logits(kind: str, tied: bool):
    models = {name: adapted(kind, tie_word_embeddings=tied) for name in ("ours", "torch's", "truth")}
    models["truth"].double()
    packed = pack([Example(IDS[0].tolist(), [True] * IDS.shape[1])])
    target = packed.batch.target
    for name, model in models.items():
        if name == "ours":
            logp = fp.linear_logprobs(hidden_states(model, packed)[0], fp.Head.of(model), target)
        else:
            logp = model(packed.input_ids).logits[0, :-1].log_softmax(-1).gather(1, target[:-1, None])
        logp.sum().backward()
    assert_gradient_close_to_truth(*(gradient(model) for model in models.values()))


def gradient(model) -> Tensor:
    """Of all that trains; one layer alone is so small that torch's error, the yardstick, is a stroke of luck."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


# ---- tied embeddings ----


def test_tied_embeddings_are_spoken_of_where_one_has_an_adapter():
    for kind in KINDS:
        ends = [name for name in ("head", "embedding") if name in kind or "both" in kind]
        note = beside_tied(adapted(kind, tie_word_embeddings=True))
        assert (note is None) == (not ends) and all(f"on the {name}" in (note or "") for name in ends)
        assert beside_tied(adapted(kind)) is None


def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone():
    model = adapted("head", tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight.clone()
    lm = merged(model)
    assert torch.equal(lm.get_input_embeddings().weight, embedding)
    assert not torch.equal(lm.get_output_embeddings().weight, embedding)


# ---- onto the disk, and into the base ----


@pytest.mark.parametrize("tied", [False, True], ids=["own weights", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_same_model(kind: str, tied: bool, tmp_path: Path):
    model = adapted(kind, tie_word_embeddings=tied)
    separate, truth = logits(model), logits(copy.deepcopy(model).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of what beside_tied has said
        save_model(merged(model), tiny.tokenizer(), tmp_path)
    assert_close_to_truth(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), separate, truth)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(tiny.model("qwen3", tie_word_embeddings=True), tiny.tokenizer(), tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_one_to_peft_and_has_no_weight_of_the_base(kind: str, base: Path):
    from peft import PeftModel
    from safetensors import safe_open

    model, tokenizer = load_model(base, peft_config=lora_config(3, **KINDS[kind]))
    model.load_state_dict({name: p for name, p in adapted(kind).named_parameters() if p.requires_grad}, strict=False)
    save_model(model, tokenizer, base.parent / "adapter")
    with safe_open(base.parent / "adapter" / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    plain = (
        {f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens")} if "whole" in kind else set()
    )
    assert all("lora_" in name for name in names - plain) and not any("base_layer" in name for name in names)
    assert len(names) == sum(p.requires_grad for p in model.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), base.parent / "adapter")
    assert torch.equal(logits(theirs.eval()), logits(model.set_attn_implementation("sdpa") or model.eval()))
    ours = load_adapter(AutoModelForCausalLM.from_pretrained(base), base.parent / "adapter")
    assert torch.equal(logits(ours.eval()), logits(theirs))
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
