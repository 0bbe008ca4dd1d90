"""DPO and its kin: the gradient of a step against float64, TRL's own first step, references, exact resume, learning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

import preference_runs as runs
import tiny
from fastpost.cli import main
from fastpost.trainers.config import Dpo
from fastpost.trainers.dpo import dpo, indifferent, objective_of
from fastpost.trainers.loop import without_dropout
from fastpost.trainers.pairs import backward, with_reference
from fastpost.trainers.reference import Reference
from rules import assert_close_to_truth, assert_gradient_close_to_truth


def config_of(files: Path | str = "f", out: Path | str = "o", **changes) -> Dpo:
    return Dpo(**runs.fields(Path(files), Path(out), **changes))


def other_model() -> Any:
    return tiny.model("qwen3", seed=1)


# ---- a step ----


def sigmoid(w: Tensor, r: Tensor, ref_w: Tensor, ref_r: Tensor) -> Tensor:
    return -F.logsigmoid(0.1 * ((w - ref_w).sum() - (r - ref_r).sum()))


def ipo(w: Tensor, r: Tensor, ref_w: Tensor, ref_r: Tensor) -> Tensor:
    return ((w - ref_w).mean() - (r - ref_r).mean() - 5).square()


def mpo(w: Tensor, r: Tensor, ref_w: Tensor, ref_r: Tensor) -> Tensor:
    bco = -F.logsigmoid(0.1 * (w - ref_w).sum()) - F.logsigmoid(-0.1 * (r - ref_r).sum())
    return 0.8 * sigmoid(w, r, ref_w, ref_r) + 0.2 * bco - w.mean()


def free(w: Tensor, r: Tensor, ref_w: Tensor, ref_r: Tensor) -> Tensor:
    return -F.logsigmoid(0.1 * (w.sum() - r.sum()))


EQUATIONS: dict[str, tuple[Callable[..., Tensor], dict]] = {
    "dpo": (sigmoid, {}),
    "ipo": (ipo, {"loss_type": "ipo"}),
    "mpo": (mpo, {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1)}),
    "free": (free, {"reference_free": True}),
}


def plain(model: nn.Module, other: nn.Module, equation: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and gradient by Hugging Face's own logits, one sequence at a time."""
    each = []
    for pair in runs.window():
        policy = [runs.logps(model, example) for example in pair.examples]
        each.append(equation(*policy, *(runs.logps(other, example).detach() for example in pair.examples)))
    loss = torch.stack(each).mean()
    return loss.detach(), runs.gradient(loss, model)


@pytest.mark.parametrize("rows", runs.ROWS)
@pytest.mark.parametrize("kind", EQUATIONS)
def test_a_window_has_the_gradient_of_the_mean_over_all_its_pairs(kind: str, rows: dict):
    equation, changes = EQUATIONS[kind]
    config = config_of(**changes, **rows)
    reference = indifferent if config.reference_free else Reference.apart(other_model(), config).scored
    model = tiny.model("qwen3").train()
    values = backward(model, runs.window(), replace(objective_of(config), reference=reference), config)
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    loss32, grad32 = plain(tiny.model("qwen3"), other_model(), equation)
    loss64, grad64 = plain(tiny.model("qwen3").double(), other_model().double(), equation)
    assert_gradient_close_to_truth(ours, grad32, grad64)
    assert_close_to_truth(torch.tensor(values["loss"]), loss32, loss64)
    assert ("displacement/both_falling" in values) != config.reference_free


@pytest.mark.parametrize("rows", runs.ROWS)
def test_each_pair_is_as_sure_as_its_row_says(rows: dict):
    sure = (0.75, 1.0, 0.25)
    pairs = [replace(pair, probability=p) for pair, p in zip(runs.window(), sure, strict=True)]
    config = config_of(soft_labels=True, **rows)
    model = tiny.model("qwen3").train()
    reference = Reference.apart(other_model(), config).scored
    values = backward(model, pairs, replace(objective_of(config), reference=reference), config)
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    each = iter([*sure, *sure])

    def soft(w: Tensor, r: Tensor, ref_w: Tensor, ref_r: Tensor) -> Tensor:
        p = next(each)
        return p * sigmoid(w, r, ref_w, ref_r) + (1 - p) * sigmoid(r, w, ref_r, ref_w)

    loss32, grad32 = plain(tiny.model("qwen3"), other_model(), soft)
    loss64, grad64 = plain(tiny.model("qwen3").double(), other_model().double(), soft)
    assert_gradient_close_to_truth(ours, grad32, grad64)
    assert_close_to_truth(torch.tensor(values["loss"]), loss32, loss64)


def test_soft_labels_of_rows(tmp_path: Path):
    files = runs.write_files(tmp_path, [row | {"probability": 1} for row in runs.SUMS])
    for name, soft in (("sure", True), ("hard", False)):
        dpo(config_of(files, tmp_path / name, soft_labels=soft, max_steps=2))
    assert runs.weights(tmp_path / "sure") == runs.weights(tmp_path / "hard")
    unsure = [row | {"probability": 0.5} for row in runs.SUMS]
    config = config_of(files, tmp_path / "unsure", soft_labels=True, max_steps=1, precompute_ref_log_probs=True)
    dpo(config, train_dataset=unsure)
    assert runs.lines(tmp_path / "unsure")[0]["grad_norm"] == 0 < runs.lines(tmp_path / "sure")[0]["grad_norm"]
    for wrong, said in ((1.5, "1.5"), (None, "nothing"), ("0.5", "'0.5'")):
        bad = [*unsure[:3], unsure[3] | {"probability": wrong}]
        with pytest.raises(ValueError, match=f"row 3, column 'probability' must be a number from 0 to 1 .* got {said}"):
            dpo(config_of(files, tmp_path / "bad", soft_labels=True), train_dataset=bad)
    with pytest.raises(ValueError, match="soft_labels are of loss_type dpo, alone or with sft: got ipo"):
        config_of(soft_labels=True, loss_type="ipo")
    with pytest.raises(ValueError, match="leave out one of them"):
        config_of(soft_labels=True, label_smoothing=0.1)


def test_what_a_reference_said_once_is_what_it_says():
    config = config_of(max_tokens_per_batch=30)
    found = with_reference(runs.window(), Reference.apart(other_model(), config).scored, config)
    for pair in found:
        assert pair.ref_logp is not None
        for known, example in zip(pair.ref_logp, pair.examples, strict=True):
            same, truth = (runs.logps(other_model().to(d), example) for d in (torch.float32, torch.float64))
            assert_close_to_truth(torch.tensor(known), same, truth)
    objective = objective_of(config)
    once = backward(tiny.model("qwen3"), found, replace(objective, reference=indifferent), config)
    live = replace(objective, reference=Reference.apart(other_model(), config).scored)
    assert once == backward(tiny.model("qwen3"), runs.window(), live, config)


def test_dropout_is_off_but_for_the_adapters():
    pytest.importorskip("peft")
    from fastpost.models.lora import lora_config, with_lora

    model = tiny.model("gpt2", n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    adapted = with_lora(model, lora_config(2, lora_dropout=0.4))
    llama = tiny.model("llama", attention_dropout=0.5)
    for each in (adapted, llama):
        without_dropout(each)
    rates = {name: module.p for name, module in adapted.named_modules() if isinstance(module, nn.Dropout)}
    assert {p for name, p in rates.items() if "lora_dropout" in name} == {0.4}
    assert {p for name, p in rates.items() if "lora_dropout" not in name} == {0.0}
    assert all(layer.self_attn.attention_dropout == 0 for layer in llama.model.layers)


# ---- TRL's own trainer ----

SAME = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
SAME += ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "grad_norm", "num_tokens")


def trls_first_step(out: Path, saved: Path, dtype: torch.dtype, **config) -> Tensor:
    trl_trainers = pytest.importorskip("trl_trainers")
    size = {"per_device_train_batch_size": 24, "max_steps": 1}
    trainer = trl_trainers.trainer_of("dpo", out, saved, dtype=dtype, **size, **config)
    trainer.ref_model.load_state_dict(other_model().to(dtype).state_dict())
    run = trl_trainers.train(trainer)
    first = trainer.state.log_history[0]
    return torch.tensor([float(run.losses[0]), *(first[name] for name in SAME)], dtype=torch.float64)


@pytest.mark.parametrize("changes", [{}, {"loss_type": ["ipo"]}, {"loss_type": ["sigmoid", "sft"], "beta": 0.3}])
def test_the_first_step_is_trls(tmp_path: Path, changes: dict):
    trl_trainers = pytest.importorskip("trl_trainers")
    rows = trl_trainers.data("dpo")
    tiny.model("qwen3").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    size = {"per_device_train_batch_size": 24, "gradient_accumulation_steps": 1, "max_steps": 1}
    config = config_of(tmp_path, tmp_path / "ours", dataset="", save_steps=0, **size, **changes)
    dpo(config, train_dataset=rows, ref_model=other_model())
    (line,) = runs.lines(tmp_path / "ours")
    trl32, trl64 = (
        trls_first_step(tmp_path / str(dtype), tmp_path / "model", dtype, **changes)
        for dtype in (torch.float32, torch.float64)
    )
    for i, name in enumerate(("loss", *SAME)):
        assert_close_to_truth(torch.tensor(line[name]), trl32[i], trl64[i], name)


# ---- whole runs ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = runs.write_files(tmp_path_factory.mktemp("files"))
    other_model().save_pretrained(found / "other")
    tiny.tokenizer().save_pretrained(found / "other")
    return found


def test_a_run_learns_which_answer_is_better(files: Path, tmp_path: Path):
    out = tmp_path / "out"
    dpo(config_of(files, out, max_steps=20, save_steps=0, eval_dataset=files / "rows.jsonl", eval_steps=10))
    first, *_, last = runs.lines(out)
    assert last["eval_loss"] < 0.5 * first["loss"] and first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert last["eval_rewards/accuracies"] > 0.9 and last["eval_rewards/margins"] > 1
    assert last["eval_displacement/both_falling"] <= last["eval_displacement/chosen_falling"]


KINDS = {
    "full": {},
    "full, the reference asked once": {"precompute_ref_log_probs": True},
    "another reference": {"ref_model": "other", "loss_type": ("dpo", "sft")},
    "lora with dropout": {"lora_r": 4, "lora_dropout": 0.3},
    "qlora, the reference asked once": {"lora_r": 4, "load_in_4bit": True, "precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_k_steps_and_a_resume_give_the_bits_of_the_straight_run(files: Path, tmp_path: Path, changes: dict):
    changes = {name: str(files / x) if name == "ref_model" else x for name, x in changes.items()}
    config = partial(config_of, files, **changes)
    dpo(config(out=tmp_path / "straight"))
    dpo(config(out=tmp_path / "resumed", resume_from_checkpoint=tmp_path / "straight" / "checkpoint-3"))
    assert runs.weights(tmp_path / "resumed") == runs.weights(tmp_path / "straight")
    assert runs.lines(tmp_path / "resumed") == runs.lines(tmp_path / "straight")[3:]


def test_the_reference_of_an_adapter_that_trains_on_is_this_adapter_as_it_was(files: Path, tmp_path: Path):
    dpo(config_of(files, tmp_path / "first", lora_r=4, learning_rate=1e-1, max_steps=1, save_steps=0))
    config = partial(config_of, files, model=tmp_path / "first", learning_rate=1e-2)
    dpo(config(out=tmp_path / "second"))
    dpo(config(out=tmp_path / "resumed", resume_from_checkpoint=tmp_path / "second" / "checkpoint-3"))
    second = runs.lines(tmp_path / "second")
    assert second[0]["rewards/margins"] == 0 and second[-1]["rewards/margins"] > 0
    assert runs.weights(tmp_path / "resumed") == runs.weights(tmp_path / "second")
    assert runs.lines(tmp_path / "resumed") == second[3:]


# ---- bad input ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "sigmod"}, r"loss_type must be one of .*, got 'sigmod' \(did you mean 'sigmoid'\?\)"),
        ({"loss_weights": (1, 2)}, "loss_weights must be one for each of the 1 of loss_type, got 2"),
        ({"reference_free": True, "ref_model": "m"}, "reference_free has no reference: leave out ref_model"),
    ],
)
def test_a_config_that_means_nothing_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discopop_tau": 1.0}, "loss_type dpo has no discopop_tau: leave it out"),
        ({"loss_type": "aot", "use_weighting": True}, "loss_type aot has no use_weighting"),
        ({"loss_type": ("aot", "dpo")}, "aot and aot_unpaired look at a whole microbatch"),
        ({"label_smoothing": 0.5}, r"'dpo': label_smoothing must be a number in \[0, 0.5\), got 0.5"),
    ],
)
def test_a_knob_that_no_loss_has_is_refused_before_anything_is_loaded(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dpo(config_of("nowhere", tmp_path, **changes))


def test_a_pair_that_fits_in_no_pack_is_refused(files: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="max_tokens_per_batch must hold the longest pair, 13 tokens, got 12"):
        dpo(config_of(files, tmp_path / "out", max_tokens_per_batch=12))
    assert not (tmp_path / "out").exists()


def test_the_command_line_runs_it(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    words = ["--model", str(files / "model"), "--dataset", str(files / "rows.jsonl"), "--max_steps", "1"]
    assert main(["dpo", *words, "--output_dir", str(tmp_path / "out"), "--loss_type", "dpo", "sft"]) == 0
    assert len(runs.lines(tmp_path / "out")) == 1
    assert "train: 18 rows, 18 pairs" in capsys.readouterr().err
