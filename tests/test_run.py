"""What goes on around a step: objects in place of paths, the best checkpoint, a stop by SIGTERM."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from fastpost.files import read_rows
from fastpost.models.loading import load_model
from fastpost.trainers import checkpoint
from fastpost.trainers.config import Dpo, Grpo, Sft
from fastpost.trainers.dpo import dpo
from fastpost.trainers.grpo import grpo
from fastpost.trainers.log import read_lines
from fastpost.trainers.sft import sft


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
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "gradient_checkpointing": False,
    }
    return Sft(**(fields | changes))


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_objects_in_place_of_paths_train_alike(files: Path, tmp_path: Path):
    config = config_of(files, tmp_path / "paths")
    sft(config)
    model, tokenizer = load_model(files / "model", dtype=torch.float32)
    objects = config_of(files, tmp_path / "objects", model="", dataset="")
    rows = read_rows(files / "sums.jsonl")
    returned = sft(objects, model=model, processing_class=tokenizer, train_dataset=rows)
    assert returned is model
    assert weights(tmp_path / "objects") == weights(tmp_path / "paths")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_datset": []}, r"sft takes no 'train_datset' \(did you mean 'train_dataset'"),
        ({"reward_funcs": len}, "sft takes no 'reward_funcs'; it takes model, processing_class"),
        ({"model": "runs/sft"}, "model must be a model, got 'runs/sft'; a directory goes into the config, as model"),
        ({"train_dataset": iter([{}])}, "must be a list of dicts or a datasets.Dataset, got list_iterator"),
        ({"eval_dataset": {"a": [{}]}}, "eval_dataset must be a list of dicts or .*, got dict"),
        ({"train_dataset": [{"text": "a"}, ["b"]]}, r"train_dataset\[1\] must be a dict, got \['b'\]"),
    ],
)
def test_what_is_given_amiss_is_named(files: Path, tmp_path: Path, given: dict, said: str):
    with pytest.raises(ValueError, match=said):
        sft(config_of(files, tmp_path), **given)


def test_what_is_not_given_is_named(files: Path, tmp_path: Path):
    model, tokenizer = load_model(files / "model")
    with pytest.raises(ValueError, match="dataset must be given: a path in the config, or rows as train_dataset"):
        sft(config_of(files, tmp_path, dataset=""), model=model, processing_class=tokenizer)
    with pytest.raises(ValueError, match="model must be given: a directory in the config, or a model as `model`"):
        sft(config_of(files, tmp_path, model=""))
    with pytest.raises(ValueError, match="processing_class must be given beside a model: its tokenizer"):
        sft(config_of(files, tmp_path, model=""), model=model)
    own = {"model": model, "processing_class": tokenizer}
    with pytest.raises(ValueError, match="ref_model is the model itself, which trains: leave it out for the model as"):
        dpo(Dpo(dataset=files / "sums.jsonl", output_dir=tmp_path), **own, ref_model=model)
    with pytest.raises(ValueError, match="reward_funcs must hold functions, got a Qwen3ForCausalLM"):
        grpo(Grpo(dataset=files / "sums.jsonl", output_dir=tmp_path), **own, reward_funcs=model)
    with pytest.raises(ValueError, match="nothing would train: no parameter of the model has requires_grad"):
        sft(config_of(files, tmp_path), **own | {"model": model.requires_grad_(False)})
    with pytest.raises(ValueError, match="train_dataset has no rows"):
        sft(config_of(files, tmp_path), train_dataset=[])
    with pytest.raises(ValueError, match="reward must name at least one function"):
        grpo(Grpo(model=files / "model", dataset=files / "sums.jsonl", output_dir=tmp_path))


def test_the_best_checkpoint_is_written_and_kept(files: Path, tmp_path: Path):
    """A learning rate that ruins the model: it is best at its first evaluation."""
    changes = {"eval_steps": 1, "metric_for_best_model": "loss"}
    changes |= {"learning_rate": 3.0, "lr_scheduler_type": "constant"}
    out = tmp_path / "out"
    config = config_of(files, out, save_steps=1, save_total_limit=1, max_steps=6, **changes)
    sft(config, eval_dataset=read_rows(files / "sums.jsonl"))
    losses = {line["step"]: line["eval_loss"] for line in read_lines(out / "metrics.jsonl")}
    best = min(losses, key=losses.__getitem__)
    assert best < 6, "the run was meant to get worse"
    assert [path.name for path in checkpoint.checkpoints(out)] == [f"checkpoint-{best}", "checkpoint-6"]
    state, _ = checkpoint.read_state(out / "checkpoint-6")
    assert state.best == {"step": best, "value": losses[best]}


@pytest.mark.parametrize(
    "length", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 0.8}], ids=["steps", "epochs"]
)
@pytest.mark.parametrize(("then", "now"), [(4, 2), (2, 4)])
def test_a_run_that_goes_on_with_other_batches_takes_rows_in_every_step(
    files: Path, tmp_path: Path, then: int, now: int, length: dict
):
    """16 rows of 20, by epochs."""
    sft(config_of(files, tmp_path / "then", per_device_train_batch_size=then, **length))
    changes = {"resume_from_checkpoint": tmp_path / "then" / "checkpoint-2", "logging_steps": 1, **length}
    sft(config_of(files, tmp_path / "now", per_device_train_batch_size=now, **changes))
    lines = read_lines(tmp_path / "now" / "metrics.jsonl")
    assert lines[-1]["step"] == (4 if "num_train_epochs" not in length else 2 + (16 - 2 * then) // now)
    assert all(line["grad_norm"] > 0 for line in lines)
    seen = 16 if "num_train_epochs" in length else 2 * then + 2 * now
    assert lines[-1]["epoch"] == pytest.approx(seen / 20)


def test_a_line_of_steps_before_and_after_a_resume_is_that_of_the_straight_run(files: Path, tmp_path: Path):
    """Lines of three steps, a checkpoint after two: the first line is a mean over both processes' steps."""
    timed = {"tokens_per_second", "peak_memory_mb"}

    def lines(out: Path) -> list[dict]:
        found = read_lines(out / "metrics.jsonl")
        return [{n: x for n, x in line.items() if n not in timed and not n.startswith("step_time/")} for line in found]

    config = {"logging_steps": 3, "max_steps": 6, "eval_dataset": files / "sums.jsonl", "eval_steps": 3}
    sft(config_of(files, tmp_path / "straight", **config))
    state, _ = checkpoint.read_state(tmp_path / "straight" / "checkpoint-2")
    assert len(state.pending["loss"]) == 2
    sft(
        config_of(files, tmp_path / "straight", **config, resume_from_checkpoint=tmp_path / "straight" / "checkpoint-2")
    )
    resumed = lines(tmp_path / "straight")
    sft(config_of(files, tmp_path / "again", **config))
    assert [line["step"] for line in resumed] == [3, 6]
    assert resumed == lines(tmp_path / "again")


def test_a_checkpoint_of_another_verb_is_refused(files: Path, tmp_path: Path):
    sft(config_of(files, tmp_path / "out"))
    fields = {"model": files / "model", "dataset": files / "sums.jsonl", "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"verb is 'grpo' and was 'sft' in .*checkpoint-4: a resumed run must have"):
        grpo(Grpo(**fields, reward="number_match", resume_from_checkpoint="latest"))


def test_a_run_that_is_over_says_so(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    sft(config_of(files, tmp_path / "out"))
    sft(config_of(files, tmp_path / "out", resume_from_checkpoint="latest"))
    assert "nothing is left to train: 4 steps are done" in capsys.readouterr().err


def test_a_metric_that_no_evaluation_gives_is_named(files: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="is of an evaluation: give eval_dataset and eval_steps as well"):
        config_of(files, tmp_path, metric_for_best_model="loss")
    with pytest.raises(ValueError, match="is of an evaluation: give eval_dataset as well"):
        sft(config_of(files, tmp_path, metric_for_best_model="loss", eval_steps=1))
    changes = {"eval_dataset": files / "sums.jsonl", "eval_steps": 1, "metric_for_best_model": "reward"}
    with pytest.raises(ValueError, match="'eval_reward' is none of an evaluation's: eval_entropy, eval_loss"):
        sft(config_of(files, tmp_path / "out", **changes))


def test_a_sigterm_saves_and_the_run_goes_on_as_if_nothing_had_been(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from fastpost.trainers import sft as module

    config = config_of(files, tmp_path / "straight", save_steps=0)
    sft(config)
    before, calls, backward = signal.getsignal(signal.SIGTERM), [], module.backward

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(*args, **kwargs)

    stopped = config_of(files, tmp_path / "stopped", save_steps=0)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(module, "backward", interrupted)
        sft(stopped)
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "stopped")] == ["checkpoint-3"]
    sft(config_of(files, tmp_path / "stopped", save_steps=0, resume_from_checkpoint="latest"))
    assert weights(tmp_path / "stopped") == weights(tmp_path / "straight")


def test_a_run_says_what_it_was_and_reports_where_it_is_told_to(files: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    sft(config_of(files, out, report_to="tensorboard", save_steps=0, logging_steps=2))
    facts = json.loads((out / "run.json").read_text())
    assert (facts["verb"], facts["config"]["max_steps"], facts["total_steps"]) == ("sft", 4, 4)
    assert {"torch", "transformers"} <= facts["versions"].keys() and facts["seconds"] > 0
    assert list(out.glob("runs/**/events.out.tfevents*"))
    with pytest.raises(ValueError, match=r"report_to must be of none, all, .*got 'tensorbored'"):
        sft(config_of(files, tmp_path / "other", report_to="tensorbored"))
    assert not (tmp_path / "other").exists()
