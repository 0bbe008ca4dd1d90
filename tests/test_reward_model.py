"""Reward models: the gradient of a step against float64, TRL's own first step, what a run leaves for roles, resume."""

from __future__ import annotations

import copy
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
from fastpost import metrics
from fastpost.cli import main
from fastpost.data import Pair
from fastpost.models.loading import load_model
from fastpost.models.roles import Roles
from fastpost.models.scalar import load_scored
from fastpost.packing import pack
from fastpost.trainers.config import Reward, Sft
from fastpost.trainers.reward import backward, reward
from fastpost.trainers.sft import sft
from rules import assert_close_to_truth, assert_gradient_close_to_truth


def config_of(files: Path | str = "f", out: Path | str = "o", **changes) -> Reward:
    return Reward(**runs.fields(Path(files), Path(out), **changes))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a causal LM, and a model that scores."""
    found = runs.write_files(tmp_path_factory.mktemp("files"))
    model = load_scored(found / "model", "it", fresh=True)
    torch.manual_seed(2)
    model.score.weight.data.normal_(0, 0.2)
    model.config.pad_token_id = 0
    model.save_pretrained(found / "scored")
    tiny.tokenizer().save_pretrained(found / "scored")
    return found


# ---- a step ----


def window(margins: tuple[float | None, ...] = (None, None, None)) -> list[Pair]:
    whole = lambda example: replace(example, loss_mask=[True] * len(example.input_ids))  # noqa: E731
    return [
        Pair(whole(pair.chosen), whole(pair.rejected), margin)
        for pair, margin in zip(runs.window(), margins, strict=True)
    ]


def plain(model: nn.Module, pairs: list[Pair], coefficient: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient by Hugging Face's own classifier, one sequence at a time."""
    each = []
    for pair in pairs:
        w, r = (model(input_ids=torch.tensor([example.input_ids])).logits[0, 0] for example in pair.examples)
        each.append(-F.logsigmoid(w - r - (pair.margin or 0)) + coefficient * (w + r).square())
    loss = torch.stack(each).mean()
    return loss.detach(), runs.gradient(loss, model)


@pytest.mark.parametrize("rows", runs.ROWS)
@pytest.mark.parametrize("margins", [(None, None, None), (0.5, 0.0, 1.5)])
def test_a_window_has_the_gradient_of_the_mean_over_all_its_pairs(files: Path, rows: dict, margins: tuple):
    config, pairs = config_of(center_rewards_coefficient=0.1, **rows), window(margins)
    model = load_scored(files / "scored", "it", fresh=False)
    ours = copy.deepcopy(model).train()
    values = backward(ours, pairs, config)
    loss32, grad32 = plain(copy.deepcopy(model), pairs, 0.1)
    loss64, grad64 = plain(copy.deepcopy(model).double(), pairs, 0.1)
    assert_gradient_close_to_truth(torch.cat([p.grad.flatten() for p in ours.parameters()]), grad32, grad64)
    assert_close_to_truth(torch.tensor(values["loss"]), loss32, loss64)


def test_length_bias_is_told_from_the_pairs_whose_lengths_differ():
    scores = torch.tensor([2.0, 1.0, 0.0, 1.0, 3.0, 1.0, 1.0, 2.0])  # right, wrong, right, wrong
    lengths = torch.tensor([5, 4, 6, 2, 3, 9, 7, 7])  # chosen longer, longer, shorter, equal
    found = metrics.floats(metrics.length_bias(scores, lengths))
    assert found == {"accuracy/longer_chosen": 0.5, "accuracy/shorter_chosen": 1.0, "longer_preferred": 1 / 3}


SAME = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward", "grad_norm", "num_tokens")


def trls_first_step(out: Path, scored: Path, dtype: torch.dtype) -> Tensor:
    trl, trl_trainers = pytest.importorskip("trl"), pytest.importorskip("trl_trainers")
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(scored, dtype=dtype)
    size = {"per_device_train_batch_size": 24, "max_steps": 1, "center_rewards_coefficient": 0.01}
    args = trl.RewardConfig(**trl_trainers.SETTINGS | {"output_dir": str(out)} | size)
    trainer = trl.RewardTrainer(
        model=model, args=args, processing_class=tiny.tokenizer(), train_dataset=trl_trainers.data("dpo")
    )
    run = trl_trainers.train(trainer)
    first = trainer.state.log_history[0]
    return torch.tensor([float(run.losses[0]), *(first[name] for name in SAME)], dtype=torch.float64)


def test_the_first_step_is_trls(files: Path, tmp_path: Path):
    trl_trainers = pytest.importorskip("trl_trainers")
    size = {"per_device_train_batch_size": 24, "gradient_accumulation_steps": 1, "max_steps": 1, "save_steps": 0}
    more = {"model": files / "scored", "dataset": "", "center_rewards_coefficient": 0.01}
    reward(config_of(files, tmp_path / "ours", **size, **more), train_dataset=trl_trainers.data("dpo"))
    (line,) = runs.lines(tmp_path / "ours")
    trl32, trl64 = (
        trls_first_step(tmp_path / str(dtype), files / "scored", dtype) for dtype in (torch.float32, torch.float64)
    )
    for i, name in enumerate(("loss", *SAME)):
        assert_close_to_truth(torch.tensor(line[name]), trl32[i], trl64[i], name)


# ---- whole runs ----


def test_a_run_learns_which_answer_is_better(files: Path, tmp_path: Path):
    held_out = {"eval_dataset": files / "rows.jsonl", "eval_steps": 10}
    reward(config_of(files, tmp_path / "out", max_steps=20, save_steps=0, **held_out))
    first, *_, last = runs.lines(tmp_path / "out")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4), "a new head says 0 of everything"
    assert last["eval_loss"] < 0.5 * first["loss"] and last["eval_accuracy"] > 0.9
    assert last["eval_accuracy/shorter_chosen"] > 0.9 and last["eval_longer_preferred"] < 0.5


KINDS = {
    "full": {},
    "full, with a head": {"model": "scored"},
    "lora with dropout": {"lora_r": 4, "lora_dropout": 0.3},
    "qlora": {"lora_r": 4, "load_in_4bit": True, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_k_steps_and_a_resume_give_the_bits_of_the_straight_run(files: Path, tmp_path: Path, changes: dict):
    changes = {name: str(files / x) if name == "model" else x for name, x in changes.items()}
    config = partial(config_of, files, **changes)
    reward(config(out=tmp_path / "straight"))
    reward(config(out=tmp_path / "resumed", resume_from_checkpoint=tmp_path / "straight" / "checkpoint-3"))
    assert runs.weights(tmp_path / "resumed") == runs.weights(tmp_path / "straight")
    assert runs.lines(tmp_path / "resumed") == runs.lines(tmp_path / "straight")[3:]


@pytest.mark.parametrize("changes", [{}, {"lora_r": 4}], ids=["whole", "an adapter on the policy's base"])
def test_what_a_run_leaves_is_a_role_beside_a_policy(files: Path, tmp_path: Path, changes: dict):
    from peft import LoraConfig

    trained = reward(config_of(files, tmp_path / "reward", **changes)).eval()
    policy, _ = load_model(files / "model")
    roles = Roles.of(policy, policy=LoraConfig(r=2), reward=tmp_path / "reward", tokenizer=tiny.tokenizer())
    sequences = [example for pair in window() for example in pair.examples]
    with torch.no_grad():
        found = roles.reward.at_ends(pack(sequences))
        same, truth = (_own_scores(trained.to(dtype), sequences) for dtype in (torch.float32, torch.float64))
    assert float(found.std()) > 0
    assert_close_to_truth(found, same, truth)


def _own_scores(model: Any, sequences: list) -> Tensor:
    return torch.stack([model(input_ids=torch.tensor([each.input_ids])).logits[0, 0] for each in sequences])


def test_an_adapter_that_scores_trains_on_and_one_that_speaks_is_refused(files: Path, tmp_path: Path):
    reward(config_of(files, tmp_path / "first", lora_r=4, save_steps=0))
    reward(config_of(files, tmp_path / "second", model=tmp_path / "first", save_steps=0))
    first, second = (runs.lines(tmp_path / name) for name in ("first", "second"))
    assert second[0]["loss"] < first[0]["loss"]
    speaks = Sft(model=str(files / "model"), output_dir=str(tmp_path / "sft"), lora_r=2, max_steps=1)
    sft(speaks, train_dataset=[{"text": "2+2=4"}] * 4)
    with pytest.raises(ValueError, match=r"is an adapter that speaks \(CAUSAL_LM\), and has no score: merge it"):
        reward(config_of(files, tmp_path / "third", model=tmp_path / "sft"))


# ---- bad input ----


def test_a_model_without_a_head_is_refused_and_so_are_rows_that_are_all_too_long(files: Path, tmp_path: Path):
    model, tokenizer = load_model(files / "model")
    with pytest.raises(ValueError, match="model must have a scalar head, a linear layer called score"):
        reward(config_of(files, tmp_path / "out", model=""), model=model, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"no row of train is left: .*18 dropped, longer than max_length"):
        reward(config_of(files, tmp_path / "out", max_length=3))
    assert not (tmp_path / "out").exists()


def test_the_command_line_runs_it(files: Path, tmp_path: Path):
    words = ["--model", str(files / "model"), "--dataset", str(files / "rows.jsonl"), "--max_steps", "1"]
    assert main(["reward", *words, "--output_dir", str(tmp_path / "out")]) == 0
    assert len(runs.lines(tmp_path / "out")) == 1
