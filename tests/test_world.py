"""Two processes, by DDP, FSDP2 or DeepSpeed, train as one does on the same global batch, and resume as one does.

The rule is that of tests/rules.py: the truth is one process in float64, the yardstick one process in fp32.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("psutil")

import psutil
from safetensors.torch import load_file

from fastpost.trainers.checkpoint import checkpoints
from fastpost.trainers.log import read_lines
from ranks import two_processes
from rules import assert_close_to_truth, assert_gradient_close_to_truth
from timeless import timeless
from world_runs import CASES, ENGINES, run, runs_of_rank, write

pytestmark = pytest.mark.slow

RESUMED = ("sft", "grpo", "grpo, KL, LoRA")
REFUSED = {(engine, "ppo, value first") for engine in ENGINES if engine.startswith("zero")}
HALF = {"max_steps": 4, "save_steps": 2}
PATIENCE = timedelta(minutes=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("world")
    write(made)
    return made


@pytest.fixture(scope="module", params=ENGINES)
def both(request: pytest.FixtureRequest, folder: Path) -> Path:
    """Every case in two processes, under one engine; and some again, from their middle."""
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed")
    out = folder / request.param
    names = [name for name in CASES if (request.param, name) not in REFUSED]
    jobs: list[tuple[str, Path, dict[str, Any]]] = [(name, out / name, {}) for name in names]
    for name in RESUMED:
        straight = out / f"{name}, straight"
        jobs.append((name, straight, HALF))
        again = {"resume_from_checkpoint": str(straight / "checkpoint-2")}
        jobs.append((name, out / f"{name}, resumed", HALF | again))
    ranks = out / "ranks"
    ranks.mkdir(parents=True)
    work = functools.partial(runs_of_rank, folder=folder, engine=request.param, jobs=jobs)
    two_processes(work, ranks, seconds=580.0, patience=PATIENCE)
    return out


@functools.cache
def alone(folder: Path, name: str, exact: bool, **changes: Any) -> Path:
    """The same case in one process."""
    out = folder / ("float64" if exact else "fp32") / name / str(len(changes))
    run(folder, name, out, 1, exact=exact, **changes)
    return out


def weights(out: Path) -> dict[str, Tensor]:
    found = sorted(out.glob("*.safetensors"))
    assert found, f"{out} has no weights"
    return {name: x for path in found for name, x in load_file(path).items()}


def lines(out: Path) -> list[dict[str, Any]]:
    return [timeless(line) for line in read_lines(out / "metrics.jsonl")]


def assert_trained_alike(ours: Path, same: Path, truth: Path) -> None:
    for got, yardstick, want in zip(lines(ours), lines(same), lines(truth), strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            if value is None:
                assert got[name] is None, name
            else:
                each = (torch.tensor(line[name], dtype=torch.float64) for line in (got, yardstick, want))
                assert_close_to_truth(*each, f"{name} of step {want['step']}")
    found, yardsticks, wanted = weights(ours), weights(same), weights(truth)
    assert found.keys() == wanted.keys()
    flat = lambda x: torch.cat([x[name].flatten().double() for name in wanted])  # noqa: E731
    assert_gradient_close_to_truth(flat(found), flat(yardsticks), flat(wanted), "weights")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(both: Path, folder: Path, name: str):
    if (both.name, name) in REFUSED:
        pytest.skip("refused by name")
    assert_trained_alike(both / name, alone(folder, name, False), alone(folder, name, True))


def test_a_process_has_its_part_of_the_weights_alone(both: Path):
    shares = [share for rank in range(2) for share in torch.load(both / "ranks" / f"{rank}.pt")]
    if both.name in ("fsdp2", "zero3"):
        assert all(0.4 < share < 0.6 for share in shares), shares  # vectors do not divide evenly
    else:
        assert set(shares) == {1.0}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_in_two_processes_has_the_bits_of_the_straight_run(both: Path, name: str):
    straight, resumed = both / f"{name}, straight", both / f"{name}, resumed"
    assert lines(resumed) == [line for line in lines(straight) if line["step"] > 2]
    for name, x in weights(straight).items():
        assert torch.equal(weights(resumed)[name], x), name


@pytest.mark.parametrize("name", RESUMED)
def test_one_process_goes_on_where_two_were(both: Path, folder: Path, name: str):
    saved = both / f"{name}, straight" / "checkpoint-2"
    out = both / f"{name}, resumed alone"
    run(folder, name, out, 1, resume_from_checkpoint=str(saved), **HALF)
    found, one, exact = map(weights, (out, alone(folder, name, False, **HALF), alone(folder, name, True, **HALF)))
    flat = lambda x: torch.cat([x[name].flatten().double() for name in exact])  # noqa: E731
    assert_gradient_close_to_truth(flat(found), flat(one), flat(exact), "weights")


# ---- as a user starts it, and as a run may end ----


def launched(folder: Path, out: Path, **flags: Any) -> list[str]:
    """torchrun of two processes, by a port that is free."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words += ["fastpost.cli", "sft", "--model", str(folder / "model"), "--dataset", str(folder / "sums.jsonl")]
    flags |= {"output_dir": out, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "logging_steps": 1}
    return words + [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("ended", ["a process is killed", "SIGTERM"])
def test_a_run_that_is_ended_goes_on(folder: Path, tmp_path: Path, ended: str):
    plan = {"max_steps": 400, "save_steps": 1, "save_total_limit": 2, "lr_scheduler_type": "constant"}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(launched(folder, tmp_path / "out", **plan), env=environment)
    deadline = time.monotonic() + 120
    while not checkpoints(tmp_path / "out"):
        assert launcher.poll() is None and time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.1)
    if ended == "SIGTERM":
        launcher.send_signal(signal.SIGTERM)
    else:
        psutil.Process(launcher.pid).children()[-1].kill()
    assert launcher.wait(60) != 0
    reached = int(checkpoints(tmp_path / "out")[-1].name.split("-")[1])
    assert reached < 398, "the run was over before it was ended"
    plan |= {"max_steps": reached + 2, "resume_from_checkpoint": "latest", "save_steps": 0}
    subprocess.run(launched(folder, tmp_path / "out", **plan), env=environment, check=True, timeout=120)
    steps = [line["step"] for line in read_lines(tmp_path / "out" / "metrics.jsonl")]
    assert steps == list(range(1, reached + 3))
