"""CPO, SimPO and ORPO: the gradient of a step against float64, TRL's own first step, exact resume, learning."""

from __future__ import annotations

from collections.abc import Callable
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
from fastpost.trainers.config import Cpo, Orpo, Simpo
from fastpost.trainers.pairs import backward
from fastpost.trainers.reference_free import cpo, objective_of, orpo, simpo
from rules import assert_close_to_truth, assert_gradient_close_to_truth

VERBS: dict[str, tuple[Callable[..., Any], type[Cpo | Simpo | Orpo]]] = {
    "cpo": (cpo, Cpo),
    "simpo": (simpo, Simpo),
    "orpo": (orpo, Orpo),
}


def config_of(verb: str, files: Path | str = "f", out: Path | str = "o", **changes) -> Cpo | Simpo | Orpo:
    return VERBS[verb][1](**runs.fields(Path(files), Path(out), **changes))


# ---- a step ----


def log_odds(m: Tensor) -> Tensor:
    return m - torch.log1p(-m.exp())


EQUATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cpo": lambda w, r: -F.logsigmoid(0.1 * (w.sum() - r.sum())) - w.mean(),
    "simpo": lambda w, r: -F.logsigmoid(2 * (w.mean() - r.mean()) - 1),
    "orpo": lambda w, r: -w.mean() - 0.1 * F.logsigmoid(log_odds(w.mean()) - log_odds(r.mean())),
}


def plain(model: nn.Module, verb: str) -> tuple[Tensor, Tensor]:
    each = [EQUATIONS[verb](*(runs.logps(model, example) for example in pair.examples)) for pair in runs.window()]
    loss = torch.stack(each).mean()
    return loss.detach(), runs.gradient(loss, model)


@pytest.mark.parametrize("rows", runs.ROWS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_window_has_the_gradient_of_the_mean_over_all_its_pairs(verb: str, rows: dict):
    config, model = config_of(verb, **rows), tiny.model("qwen3").train()
    values = backward(model, runs.window(), objective_of(config), config)
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    loss32, grad32 = plain(tiny.model("qwen3"), verb)
    loss64, grad64 = plain(tiny.model("qwen3").double(), verb)
    assert_gradient_close_to_truth(ours, grad32, grad64)
    assert_close_to_truth(torch.tensor(values["loss"]), loss32, loss64)
    assert not any(name.startswith("displacement") for name in values)


SAME = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def trls_first_step(out: Path, verb: str, saved: Path, dtype: torch.dtype) -> Tensor:
    trl_trainers = pytest.importorskip("trl_trainers")
    changes = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0} if verb == "simpo" else {}
    size = {"per_device_train_batch_size": 24, "max_steps": 1}
    name = "orpo" if verb == "orpo" else "cpo"
    trainer = trl_trainers.trainer_of(name, out, saved, dtype=dtype, **size, **changes)
    run = trl_trainers.train(trainer)
    first = trainer.state.log_history[0]
    return torch.tensor([float(run.losses[0]), *(first[each] for each in SAME)], dtype=torch.float64)


@pytest.mark.parametrize("verb", ["cpo", "simpo"])
def test_the_first_step_is_trls(tmp_path: Path, verb: str):
    """(TRL's ORPO takes the likelihood of the prompt, too.)"""
    trl_trainers = pytest.importorskip("trl_trainers")
    tiny.model("qwen3").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    size = {"per_device_train_batch_size": 24, "gradient_accumulation_steps": 1, "max_steps": 1}
    config = config_of(verb, tmp_path, tmp_path / "ours", dataset="", save_steps=0, **size)
    VERBS[verb][0](config, train_dataset=trl_trainers.data("dpo"))
    (line,) = runs.lines(tmp_path / "ours")
    trl32, trl64 = (
        trls_first_step(tmp_path / str(dtype), verb, tmp_path / "model", dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for i, name in enumerate(("loss", *SAME)):
        assert_close_to_truth(torch.tensor(line[name]), trl32[i], trl64[i], name)


# ---- whole runs ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_learns_which_answer_is_better(files: Path, tmp_path: Path, verb: str):
    VERBS[verb][0](config_of(verb, files, tmp_path / "out", max_steps=20, save_steps=0), eval_dataset=runs.SUMS)
    first, *_, last = runs.lines(tmp_path / "out")
    assert last["eval_loss"] < 0.5 * first["loss"] and last["eval_rewards/accuracies"] > 0.9


@pytest.mark.parametrize("changes", [{}, {"lora_r": 4, "lora_dropout": 0.3}], ids=["full", "lora with dropout"])
@pytest.mark.parametrize("verb", VERBS)
def test_k_steps_and_a_resume_give_the_bits_of_the_straight_run(files: Path, tmp_path: Path, verb: str, changes: dict):
    run = VERBS[verb][0]
    run(config_of(verb, files, tmp_path / "straight", **changes))
    half = tmp_path / "straight" / "checkpoint-3"
    run(config_of(verb, files, tmp_path / "resumed", resume_from_checkpoint=half, **changes))
    assert runs.weights(tmp_path / "resumed") == runs.weights(tmp_path / "straight")
    assert runs.lines(tmp_path / "resumed") == runs.lines(tmp_path / "straight")[3:]


@pytest.mark.parametrize("verb", VERBS)
def test_the_command_line_runs_it(files: Path, tmp_path: Path, verb: str):
    words = ["--model", str(files / "model"), "--dataset", str(files / "rows.jsonl"), "--max_steps", "1"]
    assert main([verb, *words, "--output_dir", str(tmp_path / "out")]) == 0
    assert len(runs.lines(tmp_path / "out")) == 1
