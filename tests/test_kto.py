"""KTO: the gradient of a step and its baseline against float64, TRL's own first step, exact resume, learning."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import preference_runs as runs
import tiny
from fastpost.cli import main
from fastpost.data import Unpaired, joined
from fastpost.trainers.config import Kto
from fastpost.trainers.kto import backward, kl, kto
from fastpost.trainers.loop import order
from fastpost.trainers.reference import Reference
from rules import assert_close_to_truth, assert_gradient_close_to_truth

LABELLED = [
    {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
    for row in runs.SUMS[:9]
    for name in ("chosen", "rejected")
]


def config_of(files: Path | str = "f", out: Path | str = "o", **changes) -> Kto:
    return Kto(**runs.fields(Path(files), Path(out), **changes))


def other_model() -> Any:
    """A reference that finds the mismatched completions less likely than the policy does."""
    return tiny.model("qwen3", seed=2)


# ---- a step ----


def window() -> list[Unpaired]:
    draw = torch.Generator().manual_seed(3)
    ids = lambda n: torch.randint(5, 97, (n,), generator=draw).tolist()  # noqa: E731
    sizes = ((3, 6, True), (1, 2, False), (5, 1, False), (2, 7, True), (4, 4, False))
    return [Unpaired(ids(prompt), ids(n), label) for prompt, n, label in sizes]


def gains(model: nn.Module, other: nn.Module, rows: list[tuple[list[int], list[int]]]) -> list[Tensor]:
    """By how much each completion is likelier than under the other model, by Hugging Face's own logits."""
    examples = [joined(prompt, completion, 10) for prompt, completion in rows]
    return [(runs.logps(model, e) - runs.logps(other, e).detach()).sum() for e in examples]


def plain_kl(model: nn.Module, other: nn.Module) -> Tensor:
    rows = window()
    mates = [(rows[i].prompt_ids, rows[i - 1].completion_ids) for i in range(len(rows))]
    return torch.stack(gains(model, other, mates)).mean().detach().clamp(min=0)


def plain(model: nn.Module, other: nn.Module, baseline: bool) -> tuple[Tensor, Tensor]:
    z = plain_kl(model, other) if baseline else 0.0
    each = []
    for one, d in zip(window(), gains(model, other, [(o.prompt_ids, o.completion_ids) for o in window()]), strict=True):
        each.append(1.5 * torch.sigmoid(0.3 * (z - d)) if one.label else 0.7 * torch.sigmoid(0.3 * (d - z)))
    loss = torch.stack(each).mean()
    return loss.detach(), runs.gradient(loss, model)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("rows", [*runs.ROWS, {"max_tokens_per_batch": 10}])
def test_a_window_has_the_gradient_of_the_mean_over_all_its_rows(loss_type: str, rows: dict):
    changes = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7, "max_length": 10}
    config = config_of(loss_type=loss_type, **changes, **rows)
    model = tiny.model("qwen3").train()
    values = backward(model, window(), Reference.apart(other_model(), config).scored, config)
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    has = loss_type == "kto"
    loss32, grad32 = plain(tiny.model("qwen3"), other_model(), has)
    loss64, grad64 = plain(tiny.model("qwen3").double(), other_model().double(), has)
    assert_gradient_close_to_truth(ours, grad32, grad64)
    assert_close_to_truth(torch.tensor(values["loss"]), loss32, loss64)
    if has:
        z32, z64 = (plain_kl(tiny.model("qwen3").to(d), other_model().to(d)) for d in (torch.float32, torch.float64))
        assert_close_to_truth(torch.tensor(values["kl"]), z32, z64)
        assert values["kl"] > 0, "a baseline of 0 would test nothing"
    else:
        assert "kl" not in values


def test_the_baseline_of_a_row_alone_is_none_and_is_never_negative():
    config, model = config_of(), tiny.model("qwen3")
    reference = Reference.apart(other_model(), config).scored
    assert kl(model, window()[:1], reference, config) == 0
    reverse = Reference.apart(tiny.model("qwen3"), config).scored
    assert kl(other_model(), window(), reverse, config) == 0


# ---- TRL's own trainer ----

SAME = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl", "entropy")
SAME += ("logits/chosen", "logits/rejected", "grad_norm", "num_tokens")


def trls_first_step(out: Path, saved: Path, dtype: torch.dtype, rows: list[dict], **changes) -> Tensor:
    trl, trl_trainers = pytest.importorskip("trl"), pytest.importorskip("trl_trainers")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    size = {"per_device_train_batch_size": len(rows), "max_steps": 1}
    args = trl.KTOConfig(**trl_trainers.SETTINGS | {"output_dir": str(out)} | size | changes)
    trainer = trl.KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(saved, dtype=dtype),
        args=args,
        processing_class=tiny.tokenizer(),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.ref_model.load_state_dict(other_model().to(dtype).state_dict())
    run = trl_trainers.train(trainer)
    first = trainer.state.log_history[0]
    return torch.tensor([float(run.losses[0]), *(first[name] for name in SAME)], dtype=torch.float64)


@pytest.mark.parametrize("changes", [{"desirable_weight": 1.3}, {"loss_type": "apo_zero_unpaired"}])
def test_the_first_step_is_trls(tmp_path: Path, changes: dict):
    """TRL takes rows in their order, so it is given them in ours: which completion is a prompt's mate depends on it."""
    tiny.model("qwen3").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    size = {"per_device_train_batch_size": len(LABELLED), "gradient_accumulation_steps": 1, "max_steps": 1}
    config = config_of(tmp_path, tmp_path / "ours", dataset="", save_steps=0, **size, **changes)
    kto(config, train_dataset=LABELLED, ref_model=other_model())
    (line,) = runs.lines(tmp_path / "ours")
    rows = [LABELLED[i] for i in order(len(LABELLED), config.seed, 0, len(LABELLED))]
    trl32, trl64 = (
        trls_first_step(tmp_path / str(dtype), tmp_path / "model", dtype, rows, **changes)
        for dtype in (torch.float32, torch.float64)
    )
    for i, name in enumerate(("loss", *SAME)):
        assert_close_to_truth(torch.tensor(line.get(name, 0.0)), trl32[i], trl64[i], name)  # no kl: TRL logs 0
    assert ("kl" in line) == ("loss_type" not in changes) and line.get("kl", 1) > 0


# ---- whole runs ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_files(tmp_path_factory.mktemp("files"), LABELLED)


def test_a_run_learns_what_is_desirable(files: Path, tmp_path: Path):
    config = config_of(files, tmp_path / "out", max_steps=20, save_steps=0, per_device_train_batch_size=4)
    kto(config, eval_dataset=LABELLED)
    first, *_, last = runs.lines(tmp_path / "out")
    assert first["loss"] == pytest.approx(0.5) and last["eval_loss"] < 0.35
    assert last["eval_rewards/chosen"] > 0.5 > -0.5 > last["eval_rewards/rejected"]


KINDS = {
    "full": {},
    "lora with dropout": {"lora_r": 4, "lora_dropout": 0.3},
    "qlora": {"lora_r": 4, "load_in_4bit": True},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_k_steps_and_a_resume_give_the_bits_of_the_straight_run(files: Path, tmp_path: Path, changes: dict):
    config = partial(config_of, files, **changes)
    kto(config(out=tmp_path / "straight"))
    kto(config(out=tmp_path / "resumed", resume_from_checkpoint=tmp_path / "straight" / "checkpoint-3"))
    assert runs.weights(tmp_path / "resumed") == runs.weights(tmp_path / "straight")
    assert runs.lines(tmp_path / "resumed") == runs.lines(tmp_path / "straight")[3:]


# ---- what is said ----


def test_an_unbalanced_file_is_told_with_the_weights_that_would_mend_it(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    config = partial(config_of, files, max_steps=1, save_steps=0, dataset="")
    kto(config(out=tmp_path / "even"), train_dataset=LABELLED)
    assert "would balance" not in capsys.readouterr().err
    few = [row for i, row in enumerate(LABELLED) if not row["label"] or i < 6]
    kto(config(out=tmp_path / "few"), train_dataset=few)
    said = "3 desirable rows and 9 undesirable ones: a desirable_weight from 3 to 4 would balance them"
    assert said in capsys.readouterr().err
    kto(config(out=tmp_path / "mended", desirable_weight=3.5), train_dataset=few)
    assert "would balance" not in capsys.readouterr().err


def test_a_step_of_one_row_has_no_baseline():
    with pytest.raises(ValueError, match="compares a row with another one of its step, which has 1: make"):
        config_of(per_device_train_batch_size=1, gradient_accumulation_steps=1)
    alone = config_of(loss_type="apo_zero_unpaired", per_device_train_batch_size=1, gradient_accumulation_steps=1)
    assert alone.rows_per_step == 1


def test_the_command_line_runs_it(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    words = ["--model", str(files / "model"), "--dataset", str(files / "rows.jsonl"), "--max_steps", "1"]
    assert main(["kto", *words, "--output_dir", str(tmp_path / "out")]) == 0
    assert "train: 18 rows, 18 examples" in capsys.readouterr().err
