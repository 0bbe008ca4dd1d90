"""A directory with an adapter: a model to train on, on the base that it names, and none on any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("peft")

from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from fastpost.cli import main
from fastpost.models.adapters import is_adapter, load_adapter, with_weights
from fastpost.models.loading import load_model
from fastpost.models.lora import lora_config
from fastpost.models.qlora import four_bit_config, is_quantised
from fastpost.models.saving import save_model
from fastpost.trainers.config import Merge, Sft
from fastpost.trainers.merge import merge
from fastpost.trainers.start import start

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
IDS = torch.arange(5, 29)[None]


def save_base(path: Path, model_type: str = "qwen3", **changes) -> Path:
    save_model(tiny.model(model_type, **(SHAPE | changes)), tiny.tokenizer(), path)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def adapter(base: Path) -> Path:
    """A trained one, in a directory beside that of its base."""
    model, tokenizer = load_model(
        base, peft_config=lora_config(2, lora_target_modules=["q_proj", "o_proj", "up_proj", "lm_head"])
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    save_model(model, tokenizer, base.parent / "adapter")
    return base.parent / "adapter"


@torch.no_grad()
def logits(model) -> Tensor:
    return model.eval()(IDS, use_cache=False).logits


def rewritten(adapter: Path, **changes) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- a model to train on ----


def test_it_is_its_base_with_the_adapter_which_trains_on(adapter: Path, base: Path, monkeypatch):
    monkeypatch.chdir(adapter)  # the base is found from anywhere
    assert is_adapter(adapter) and not is_adapter(base)
    model, tokenizer = load_model(adapter)
    saved = load_file(adapter / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == saved.keys() and all(torch.equal(trained[name], saved[name]) for name in saved)
    assert not torch.allclose(logits(model), logits(load_model(base)[0]))
    assert tokenizer.chat_template == tiny.TEMPLATE


def test_a_rank_is_of_a_fresh_adapter_only(adapter: Path):
    with pytest.raises(
        ValueError, match=r"adapter' is an adapter, which trains on as it is: leave lora_r out, or merge"
    ):
        load_model(adapter, peft_config=lora_config(2))


def test_a_run_continues_it_on_a_base_in_4_bits(adapter: Path, tmp_path: Path):
    config = Sft(model=adapter, dataset="d", output_dir=tmp_path / "out", load_in_4bit=True)
    began = start(config)
    assert is_quantised(began.model) and "Params4bit" not in str(began.optimizer.param_groups)
    count = sum(p.numel() for p in load_file(adapter / "adapter_model.safetensors").values())
    assert sum(p.numel() for group in began.optimizer.param_groups for p in group["params"]) == count


def test_other_weights_are_there_for_a_while_and_its_own_come_back_after_an_error_too(adapter: Path):
    model, _ = load_model(adapter)
    parameters, before = list(model.parameters()), logits(model)
    other = {name: 2 * x for name, x in load_file(adapter / "adapter_model.safetensors").items()}
    with pytest.raises(RuntimeError), with_weights(model, other):
        assert not torch.allclose(logits(model), before)
        raise RuntimeError
    assert torch.equal(logits(model), before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


# ---- another base ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, r"lm_head.lora_A.weight has shape \(2, 64\) in the file, and \(2, 32\) would fit"),
        ({"num_hidden_layers": 1}, r"layers\.1\..* and 5 more are in the file alone"),
        ({"num_hidden_layers": 3}, r"layers\.2\..* and 5 more are in the model alone"),
        ({"vocab_size": 98}, r"lm_head.lora_B.weight has shape \(97, 2\) in the file, and \(98, 2\) would fit"),
    ],
    ids=str,
)
def test_an_adapter_for_another_base_is_refused_by_name(adapter: Path, changes: dict, message: str):
    base = save_base(adapter.parent / "other", **changes)
    whole = rf"the adapter '.*adapter' does not fit \w+ of .*other: .*{message}"
    with pytest.raises(ValueError, match=whole):
        load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)
    rewritten(adapter, base_model_name_or_path=str(base))
    with pytest.raises(ValueError, match=whole):
        load_model(adapter)


def test_a_base_that_peft_saved_beside_an_adapter_is_compared_and_never_loaded(adapter: Path, base: Path):
    """It does so where an adapter is on the head, in the dtype that the base had then."""
    key = "base_model.model.lm_head.base_layer.weight"
    file, head = adapter / "adapter_model.safetensors", load_file(base / "model.safetensors")["lm_head.weight"]
    alone = load_file(file)
    save_file(alone | {key: head.bfloat16()}, file, metadata={"format": "pt"})
    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)
    with with_weights(model, load_file(file)):
        pass
    assert torch.equal(model.get_base_model().lm_head.base_layer.weight, head)
    for other, message in (
        (head + 1, f"{key} of its base has other values here: load the base that it was trained on"),
        (head.new_zeros(104, 64), rf"{key} of its base has shape \(104, 64\), and here \(97, 64\): the vocabulary was"),
    ):
        save_file(alone | {key: other}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"adapter' does not fit Qwen3ForCausalLM of .*base: {message}"):
            load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)


def test_an_adapter_for_another_family_is_refused_by_name(adapter: Path, base: Path):
    llama = save_base(adapter.parent / "llama", "llama")
    with pytest.raises(
        ValueError, match=r"was made for a qwen3 \(.*base\), and LlamaForCausalLM of .*llama is a llama"
    ):
        load_adapter(AutoModelForCausalLM.from_pretrained(llama), adapter)
    rewritten(adapter, base_model_name_or_path=str(save_base(adapter.parent / "gpt2", "gpt2")))
    with pytest.raises(
        ValueError, match=r"does not fit GPT2LMHeadModel of .*up_proj.* and 11 more are in the file alone"
    ):
        load_model(adapter)


def test_what_is_missing_is_named(adapter: Path, base: Path):
    rewritten(adapter, base_model_name_or_path=str(base) + "x")
    with pytest.raises(
        ValueError, match=r"adapter' is an adapter, and its base: .*basex' is no directory \(did you mean"
    ):
        load_model(adapter)
    rewritten(adapter, base_model_name_or_path=str(adapter))
    with pytest.raises(ValueError, match="which is an adapter itself: merge that first"):
        load_model(adapter)
    rewritten(adapter, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="names no base: write its directory as base_model_name_or_path"):
        load_model(adapter)
    rewritten(adapter, base_model_name_or_path=str(base))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter' has no adapter_model\.safetensors"):
        load_model(adapter)
    (adapter / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not the JSON object that peft writes"):
        load_model(adapter)


def test_a_tokenizer_with_other_or_more_tokens_than_the_base_has_rows_is_refused(adapter: Path, base: Path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(ValueError, match=r"adapter has 98 tokens, but the model embeds only 97"):
        load_model(adapter)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text((base / name).read_text())
    (adapter / "tokenizer.json").write_text((base / "tokenizer.json").read_text().replace('"a": ', '"é": '))
    with pytest.raises(ValueError, match=r"another vocabulary than that of the adapter's base, .*: 'a' is missing in"):
        load_model(adapter)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).unlink()
    assert load_model(adapter)[1].get_vocab() == tiny.tokenizer().get_vocab()  # the base's


# ---- what a run asks for ----


def test_every_field_of_a_run_reaches_peft(base: Path, tmp_path: Path):
    own = {"lora_alpha": 5, "lora_dropout": 0.25, "use_rslora": True, "use_dora": True}
    names = {"lora_target_modules": ("q_proj", "up_proj"), "lora_modules_to_save": ("lm_head",)}
    fields = {"lora_r": 3, "init_lora_weights": "gaussian", **own, **names}
    config = start(Sft(model=base, dataset="d", output_dir=tmp_path / "out", **fields)).model.peft_config["default"]
    assert (config.r, config.init_lora_weights, config.target_modules) == (3, "gaussian", {"q_proj", "up_proj"})
    assert config.modules_to_save == ["lm_head"] and {name: getattr(config, name) for name in own} == own


def test_tied_embeddings_are_spoken_of_before_the_run(tmp_path: Path, capsys):
    base = save_base(tmp_path / "tied", tie_word_embeddings=True)
    fields = {"model": base, "dataset": "d", "output_dir": tmp_path / "out", "lora_r": 2}
    start(Sft(**fields))
    assert "tied" not in capsys.readouterr().err
    start(Sft(**fields, lora_target_modules=("q_proj", "lm_head")))
    assert "embedding and head are tied: the weight that they share stays as it is" in capsys.readouterr().err


def test_what_trains_is_in_fp32_where_autocast_computes_in_bfloat16_and_if_not_that_is_said(
    base: Path, tmp_path: Path, capsys
):
    """A step of AdamW is about learning_rate, and next to 1 bfloat16 has nothing below 2^-8."""
    fields = {"model": base, "dataset": "d", "output_dir": tmp_path / "out", "dtype": "bfloat16", "lora_r": 2}
    whole = {"lora_modules_to_save": ("lm_head",)}
    kinds = [start(Sft(**fields, **whole, bf16=bf16)).optimizer.param_groups for bf16 in (True, False)]
    wide, narrow = ({p.dtype for group in groups for p in group["params"]} for groups in kinds)
    assert wide == {torch.float32} and narrow == {torch.float32, torch.bfloat16}
    said = "1 of the trained tensors in bfloat16, which rounds small steps away: give bf16 as well, or dtype float32"
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is refused where there is no GPU")
@pytest.mark.parametrize("field", ["use_liger_kernel", "activation_offloading"])
def test_what_wants_a_gpu_is_refused_without_one(field: str, base: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=rf"{field} .* GPU.* and here is no"):
        start(Sft(model=base, dataset="d", output_dir=tmp_path / "out", **{field: True}))
    with pytest.raises(ValueError, match="activation_offloading moves what gradient_checkpointing keeps"):
        Sft(model=base, dataset="d", output_dir="o", activation_offloading=True, gradient_checkpointing=False)


# ---- the merge command ----


def test_the_merge_command_leaves_a_model_like_any_other(adapter: Path, tmp_path: Path):
    assert main(["merge", "--model", str(adapter), "--output_dir", str(tmp_path / "out")]) == 0
    merged, tokenizer = load_model(tmp_path / "out")
    assert not is_adapter(tmp_path / "out") and len(tokenizer) == 97
    model, _ = load_model(adapter)
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            want = module.base_layer.weight + module.get_delta_weight("default")
            torch.testing.assert_close(merged.get_submodule(name).weight, want)


def test_a_base_in_4_bits_is_dequantised_and_that_is_said(adapter: Path, tmp_path: Path, capsys):
    words = ["merge", "--model", str(adapter), "--output_dir", str(tmp_path / "out"), "--load_in_4bit"]
    assert main(words) == 0
    assert "is quantised: what is merged, and saved, is its dequantised weights" in capsys.readouterr().err
    merged, _ = load_model(tmp_path / "out")
    assert not is_quantised(merged)
    model, _ = load_model(adapter, quantization_config=four_bit_config())
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.weight
            plain = weight if name == "lm_head" else dequantize_4bit(weight.data, weight.quant_state)
            want = plain + module.get_delta_weight("default")
            torch.testing.assert_close(merged.get_submodule(name).weight, want.to(merged.dtype))


def test_only_an_adapter_can_be_merged(base: Path):
    with pytest.raises(ValueError, match=r"is no directory of a PEFT adapter: it has no adapter_config\.json"):
        Merge(model=base, output_dir="o")


def test_a_merge_does_not_write_over_what_it_reads(adapter: Path, base: Path):
    for path in (adapter, base):
        with pytest.raises(ValueError, match=r"output_dir .* holds what is merged: choose another"):
            merge(Merge(model=adapter, output_dir=path))


def test_an_adapter_that_went_to_nan_is_not_merged(adapter: Path, tmp_path: Path, capsys):
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert main(["merge", "--model", str(adapter), "--output_dir", str(tmp_path / "out")]) == 2
    assert "fastpost merge: the adapter cannot be merged: NaNs detected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
