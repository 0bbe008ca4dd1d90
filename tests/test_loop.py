"""What the loops share: order and randomness as functions of the seed, the schedule, the optimizer, options, files."""

from __future__ import annotations

import json
import math
import random
import resource
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import save_file

from fastpost.trainers import checkpoint, log, loop, optimizers
from fastpost.trainers.checkpoint import State
from fastpost.trainers.config import Grpo, Sft
from fastpost.trainers.plots import plot_metrics
from fastpost.trainers.start import Parts, Start, start


def config(**changes) -> Sft:
    return Sft(**({"model": "m", "dataset": "d", "output_dir": "o"} | changes))


def test_every_epoch_is_another_permutation_and_any_slice_can_be_asked_for():
    whole = loop.order(7, 3, 0, 21)
    epochs = [whole[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert loop.order(7, 3, 5, 16) == whole[5:16]
    assert loop.order(7, 4, 0, 7) != epochs[0]


def test_a_step_seeds_every_generator():
    def draws(step: int) -> tuple[float, float, float]:
        loop.seed_step(1, step)
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    first = draws(5)
    assert first == draws(5)
    assert all(a != b for a, b in zip(first, draws(6), strict=True))


@pytest.mark.parametrize(
    ("changes", "steps", "wanted"),
    [
        ({"lr_scheduler_type": "linear"}, (0, 5, 9), (1.0, 0.5, 0.1)),
        ({"lr_scheduler_type": "cosine"}, (0, 5, 9), (1.0, 0.5, 0.5 + 0.5 * math.cos(0.9 * math.pi))),
        ({"lr_scheduler_type": "constant", "warmup_steps": 4}, (0, 1, 3, 4, 9), (0.25, 0.5, 1.0, 1.0, 1.0)),
        ({"lr_scheduler_type": "linear", "warmup_steps": 0.2}, (0, 1, 2, 6), (0.5, 1.0, 1.0, 0.5)),
        ({"lr_scheduler_type": "constant", "warmup_steps": 0.05}, (0,), (1.0,)),
    ],
)
def test_the_schedule(changes: dict, steps: tuple[int, ...], wanted: tuple[float, ...]):
    rates = [loop.learning_rate(config(learning_rate=1.0, **changes), step, 10) for step in steps]
    assert rates == pytest.approx(wanted)


def test_packs_are_microbatches_of_rows_or_filled_up_to_a_cap():
    lengths = [6, 2, 5, 3]
    assert loop.bins(lengths, config(per_device_train_batch_size=3)) == [[0, 1, 2], [3]]
    packed = loop.bins(lengths, config(max_tokens_per_batch=8))
    assert len(packed) == 2 and all(sum(lengths[i] for i in rows) == 8 for rows in packed)


def test_rounds_that_are_left():
    by_steps, by_epochs = config(max_steps=6), config(num_train_epochs=2.5)
    assert [loop.rounds_left(by_steps, 3, 4, 2, step, 99) for step in (0, 2, 3, 6, 8)] == [3, 2, 1, 0, 0]
    assert [loop.rounds_left(by_epochs, 3, 4, 2, 0, taken) for taken in (0, 4, 8, 9)] == [2, 1, 0, 0]
    assert (loop.last_row(by_steps, 3), loop.last_row(by_epochs, 3)) == (math.inf, 8)


def test_something_is_due_when_a_multiple_was_reached_or_passed():
    assert [loop.due(step, step + 4, 10) for step in range(0, 24, 4)] == [False, False, True, False, True, False]
    assert not loop.due(0, 5, 0)


def test_vectors_do_not_decay_and_frozen_weights_are_left_out():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
    model[2].requires_grad_(False)
    groups = optimizers.adamw(loop.trainable(model), config(weight_decay=0.3)).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.3, 1), (0.0, 3)]


def test_a_step_clips_steps_and_clears():
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=99.0)
    assert loop.apply_gradients([model.weight], optimizer, 0.5, max_norm=1.0) == pytest.approx(5.0)
    torch.testing.assert_close(before - model.weight.detach(), 0.5 * torch.tensor([[0.6, 0.8]]))
    assert model.weight.grad is None


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_applied():
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[float("nan"), 1.0]])
    with pytest.raises(FloatingPointError, match="norm is nan"):
        loop.apply_gradients([model.weight], torch.optim.SGD(model.parameters(), lr=1.0), 1.0, 1.0)
    assert torch.equal(model.weight, before)


# ---- files ----


def test_a_line_is_the_mean_of_its_steps_and_json_has_no_nan(tmp_path: Path):
    lines = log.Log(tmp_path, 0, num_tokens=10, pending={})
    lines.add({"loss": 1.0, "kl": 4.0}, tokens=5)
    lines.add({"loss": 3.0, "reward": math.nan}, tokens=7)
    lines.write(2, 0.5)
    lines.add({"loss": 9.0}, tokens=1)
    lines.write(3, 0.75)
    first, second = log.read_lines(tmp_path / "metrics.jsonl")
    assert (first["loss"], first["kl"], first["reward"], first["num_tokens"]) == (2.0, 4.0, None, 22)
    assert (second["loss"], second["step"], "kl" in second) == (9.0, 3, False)


def test_lines_after_the_step_of_a_resume_go_and_so_does_half_a_line(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log.keep_until(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_checkpoints_are_found_by_number_and_half_written_ones_are_not(tmp_path: Path):
    for name in ("checkpoint-9", "checkpoint-10", ".checkpoint-11.4242", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    with pytest.raises(ValueError, match=r"is no checkpoint: it has no state\.json"):
        checkpoint.find(config(resume_from_checkpoint=str(tmp_path)))


def saved_run(directory: Path, steps: Sequence[int], best: dict | None = None, **changes) -> None:
    """Checkpoints of a run of nothing."""
    model = torch.nn.Linear(2, 2)
    saved = SimpleNamespace(save_pretrained=lambda path: None)
    begun = Start(
        Parts(saved, saved, [], lambda path: save_file({"w": model.weight.detach()}, path / "m.safetensors")),
        torch.optim.AdamW(model.parameters()),
    )
    for step in steps:
        checkpoint.save(config(output_dir=directory, **changes), begun, State(step, best=best))


def test_the_newest_sound_checkpoint_is_the_latest(tmp_path: Path, capsys):
    latest = config(output_dir=str(tmp_path), resume_from_checkpoint="latest")
    assert checkpoint.find(latest) is None
    assert "holds no checkpoint to resume from: the run begins at step 0" in capsys.readouterr().err
    saved_run(tmp_path, (2, 4, 6))
    assert checkpoint.find(latest) == tmp_path / "checkpoint-6"
    spoil = tmp_path / "checkpoint-6" / "m.safetensors"
    spoil.write_bytes(spoil.read_bytes()[:-1] + b"\0")
    (tmp_path / "checkpoint-4" / "optimizer.safetensors").unlink()
    assert checkpoint.find(latest) == tmp_path / "checkpoint-2"
    said = capsys.readouterr().err
    assert "checkpoint-6 is spoilt: m.safetensors is not what was written: it is passed over" in said
    assert "checkpoint-4 is spoilt: optimizer.safetensors is missing: it is passed over" in said
    with pytest.raises(ValueError, match=r"checkpoint-6' is spoilt: m\.safetensors is not what was written"):
        checkpoint.find(config(resume_from_checkpoint=str(tmp_path / "checkpoint-6")))


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("")
    for left in ("checkpoint-2", "config.json"):
        (tmp_path / left).mkdir()
        with pytest.raises(ValueError, match="holds a run already: continue it with --resume_from_checkpoint latest"):
            checkpoint.check_output_dir(config(output_dir=tmp_path))
        checkpoint.check_output_dir(config(output_dir=tmp_path, resume_from_checkpoint="latest"))
        (tmp_path / left).rmdir()


def test_a_run_that_left_nothing_to_resume_is_begun_again(tmp_path: Path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    checkpoint.check_output_dir(config(output_dir=tmp_path))
    assert "holds a run that left no checkpoint: it is begun again" in capsys.readouterr().err


def test_an_output_dir_that_cannot_be_made_is_refused_before_anything_runs(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be made: .*file is a file"):
        checkpoint.check_output_dir(config(output_dir=tmp_path / "file" / "x"))


def test_a_checkpoint_of_other_adapters_is_refused_by_the_field(tmp_path: Path):
    saved_run(tmp_path, (1,), lora_r=4)
    with pytest.raises(ValueError, match=r"lora_r is 8 and was 4 in .*checkpoint-1: a resumed run must have the same"):
        start(config(output_dir=tmp_path, lora_r=8, resume_from_checkpoint="latest"))


def test_the_newest_checkpoints_are_kept_and_the_best(tmp_path: Path):
    saved_run(tmp_path, (1, 2, 3, 4), best={"step": 1, "value": 0.5}, save_total_limit=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [f"checkpoint-{i}" for i in (1, 3, 4)]


def test_a_full_disk_is_said_and_what_was_there_stays(tmp_path: Path):
    saved_run(tmp_path, (1,))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(
            ValueError, match=r"checkpoint-2 could not be written: .*; the run can go on from .*checkpoint-1"
        ):
            saved_run(tmp_path, (2,))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"] and not checkpoint.spoilt(
        tmp_path / "checkpoint-1"
    )


def test_checkpoints_after_the_one_resumed_are_renamed_as_often_as_it_is(tmp_path: Path, capsys):
    for again in (1, 2):
        for step in (1, 2, 10):
            (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
            (tmp_path / f"checkpoint-{step}" / "written").touch()
        checkpoint.set_later_aside(tmp_path, 2)
        assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
        assert (tmp_path / f"checkpoint-10.abandoned-{again}" / "written").exists()
        assert f"checkpoint-10: it is now checkpoint-10.abandoned-{again}" in capsys.readouterr().err


def test_the_plot_shows_what_there_is(tmp_path: Path):
    log.append(tmp_path / "metrics.jsonl", [{"step": i, "loss": 1 / i, "kl": None} for i in (1, 2)])
    plot_metrics(tmp_path)
    assert (tmp_path / "metrics.png").read_bytes()[:4] == b"\x89PNG"


def test_a_config_reads_what_python_yaml_and_flags_write():
    read = Grpo(model=Path("m"), dataset="d", output_dir="o", reward="f", reward_weights=["2"], learning_rate="1e-4")
    assert (read.model, read.reward, read.reward_weights, read.learning_rate) == ("m", ("f",), (2.0,), 1e-4)
    assert json.loads(json.dumps(checkpoint.plain(read)))["reward"] == ["f"]


def test_what_a_killed_process_had_begun_to_write_goes(tmp_path: Path):
    out = tmp_path / "out"
    for name in ("out/.checkpoint-3.4242", "out/.rollouts.17", ".out.99", "out/checkpoint-2", ".other.99", "out/.git"):
        (tmp_path / name).mkdir(parents=True)
    checkpoint.clear(out)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"out", "out/checkpoint-2", ".other.99", "out/.git"}
