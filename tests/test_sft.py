"""Supervised fine-tuning: the gradient of a packed window against float64, exact resume, what a run leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import tiny
from fastpost.models.loading import load_model
from fastpost.packing import Example
from fastpost.trainers import checkpoint
from fastpost.trainers.config import Sft
from fastpost.trainers.log import read_lines
from fastpost.trainers.sft import backward, evaluate, sft
from rules import assert_close_to_truth, assert_gradient_close_to_truth
from timeless import timeless


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory and a file of sums."""
    directory = tmp_path_factory.mktemp("files")
    tiny.model("qwen3").save_pretrained(directory / "model")
    tiny.tokenizer().save_pretrained(directory / "model")
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(5) for b in range(4)]
    (directory / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def config_of(files: Path, out: Path, **changes) -> Sft:
    fields = {
        "model": files / "model",
        "dataset": files / "sums.jsonl",
        "output_dir": out,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 3,
        "gradient_checkpointing": False,
    }
    return Sft(**(fields | changes))


def window() -> list[Example]:
    draw = torch.Generator().manual_seed(1)
    found = []
    for n, prompt in ((9, 3), (4, 1), (12, 5), (7, 6)):
        ids = torch.randint(5, 97, (n,), generator=draw).tolist()
        found.append(Example(ids, [i >= prompt for i in range(n)]))
    return found


def plain_gradient(model: nn.Module, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Loss and gradient by Hugging Face's own logits, one sequence at a time."""
    total, count = torch.zeros((), dtype=next(model.parameters()).dtype), 0
    for example in examples:
        logp = model(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        for i in example.predicted:
            total = total - logp[i - 1, example.input_ids[i]]
            count += 1
    loss = total / count
    return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("rows", [{"per_device_train_batch_size": 3}, {"max_tokens_per_batch": 16}])
def test_a_window_has_the_gradient_of_the_mean_over_all_its_tokens(tmp_path: Path, rows: dict):
    """Packs of unequal numbers of tokens: a mean of their means would be another gradient."""
    model = tiny.model("qwen3").train()
    values = backward(model, window(), config_of(tmp_path, tmp_path, **rows))
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    loss32, grad32 = plain_gradient(tiny.model("qwen3"), window())
    loss64, grad64 = plain_gradient(tiny.model("qwen3").double(), window())
    assert_gradient_close_to_truth(ours, grad32, grad64)
    assert_close_to_truth(torch.tensor(values["loss"]), loss32, loss64)


def test_accuracy_and_entropy_are_those_of_the_logits(tmp_path: Path):
    model, examples = tiny.model("qwen3"), window()
    right, entropy, count = 0, 0.0, 0
    for example in examples:
        logp = model(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1).detach()
        for i in example.predicted:
            right += int(logp[i - 1].argmax()) == example.input_ids[i]
            entropy -= float((logp[i - 1].exp() * logp[i - 1]).sum())
            count += 1
    values = evaluate(model, examples, config_of(tmp_path, tmp_path))
    assert values["eval_mean_token_accuracy"] == pytest.approx(right / count)
    assert values["eval_entropy"] == pytest.approx(entropy / count)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_learns_and_leaves_a_model_metrics_and_a_plot(files: Path, tmp_path: Path):
    out = tmp_path / "out"
    sft(config_of(files, out, max_steps=30, logging_steps=20, eval_dataset=files / "sums.jsonl", eval_steps=10))
    lines = read_lines(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    assert lines[-1]["epoch"] == 30 * 6 / 20
    names = {"grad_norm", "learning_rate", "num_tokens", "mean_token_accuracy", "entropy", "eval_mean_token_accuracy"}
    assert names <= lines[-1].keys()
    assert (out / "metrics.png").exists()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out)
    ids = AutoTokenizer.from_pretrained(out)("2+3=5<eos>", return_tensors="pt").input_ids
    before = AutoModelForCausalLM.from_pretrained(files / "model")(input_ids=ids, labels=ids).loss
    assert model(input_ids=ids, labels=ids).loss < before


KINDS = {
    "full": {},
    "lora with dropout": {"lora_r": 4, "lora_dropout": 0.3},
    "8-bit moments": {"optim": "adamw_8bit"},
    "qlora, paged, tiled": {
        "lora_r": 4, "load_in_4bit": True, "optim": "paged_adamw_32bit", "tiled_mlp": 5, "gradient_checkpointing": True
    },
    "dora, head and embedding": {"lora_r": 2, "use_dora": True, "lora_modules_to_save": ("lm_head", "embed_tokens")},
    "the same in bfloat16": {
        "lora_r": 2, "dtype": "bfloat16", "bf16": True, "lora_modules_to_save": ("lm_head", "embed_tokens")
    },
}  # fmt: skip


@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
def test_k_steps_and_a_resume_give_the_bits_of_the_straight_run(files: Path, tmp_path: Path, lora: dict):
    sft(config_of(files, tmp_path / "straight", **lora))
    config = config_of(files, tmp_path / "resumed", **lora)
    sft(replace(config, output_dir=str(tmp_path / "killed")))
    resumed = replace(config, resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-3"))
    sft(resumed)
    weights = "adapter_model.safetensors" if "lora_r" in lora else "model.safetensors"
    assert (tmp_path / "resumed" / weights).read_bytes() == (tmp_path / "straight" / weights).read_bytes()
    straight, after = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("straight", "resumed"))
    assert [timeless(line) for line in after] == [timeless(line) for line in straight[3:]]


def test_latest_continues_in_place_and_forgets_lines_after_the_checkpoint(files: Path, tmp_path: Path):
    config = config_of(files, tmp_path / "out", max_steps=4, lr_scheduler_type="constant")
    sft(config)  # its checkpoint is of step 3, its last line of step 4
    sft(replace(config, max_steps=5, resume_from_checkpoint="latest"))
    assert [line["step"] for line in read_lines(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    sft(replace(config, max_steps=5, output_dir=str(tmp_path / "straight")))
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "straight")]
    assert same[0] == same[1]


def test_a_run_that_goes_back_keeps_what_it_writes_and_continues_from_there(files: Path, tmp_path: Path):
    out = tmp_path / "out"
    config = config_of(files, out, save_steps=1, max_steps=3)
    sft(config)
    sft(replace(config, max_steps=2, resume_from_checkpoint=str(out / "checkpoint-1"), save_total_limit=1))
    (kept,) = checkpoint.checkpoints(out)
    facts = json.loads((kept / "state.json").read_text())
    assert kept.name == "checkpoint-2" and facts["config"]["max_steps"] == 2  # the second run's, not the first one's
    assert {path.name for path in out.glob("*abandoned*")} == {f"checkpoint-{i}.abandoned-1" for i in (2, 3)}


def test_resuming_with_another_setting_says_so(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    config = config_of(files, tmp_path / "out", max_steps=3)
    sft(config)
    sft(replace(config, max_steps=4, learning_rate=1e-4, resume_from_checkpoint="latest"))
    assert "resuming with another learning_rate: 0.0001, in the checkpoint 0.003" in capsys.readouterr().err


def test_resuming_with_other_rows_says_so(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((files / "sums.jsonl").read_text())
    config = config_of(files, tmp_path / "out", dataset=rows, max_steps=3)
    sft(config)
    sft(replace(config, max_steps=4, resume_from_checkpoint="latest"))
    assert "examples to train on" not in capsys.readouterr().err
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    sft(replace(config, max_steps=5, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3")))
    assert "resuming with 19 examples to train on, not 20 as before" in capsys.readouterr().err


def test_epochs_end_where_the_rows_do(files: Path, tmp_path: Path):
    sft(config_of(files, tmp_path / "out", max_steps=-1, num_train_epochs=1, save_steps=0))
    lines = read_lines(tmp_path / "out" / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [0.3, 0.6, 0.9, 1.0]  # 6 + 6 + 6 + 2 of 20 rows


def test_a_row_that_fits_in_no_pack_is_refused_before_anything_is_written(files: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="max_tokens_per_batch must hold the longest row, 6 tokens, got 5"):
        sft(config_of(files, tmp_path / "out", max_tokens_per_batch=5))
    assert not (tmp_path / "out").exists()


def test_four_bits_need_an_adapter_and_a_file_is_no_output_dir(files: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="give lora_r as well"):
        config_of(files, tmp_path, load_in_4bit=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        checkpoint.check_output_dir(config_of(files, tmp_path / "file"))


def test_the_run_uses_the_model_it_was_given(files: Path, tmp_path: Path):
    """A learning rate of 0 leaves every weight as it was."""
    sft(config_of(files, tmp_path / "out", learning_rate=0.0, max_steps=2))
    before, _ = load_model(files / "model")
    after, _ = load_model(tmp_path / "out")
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)
