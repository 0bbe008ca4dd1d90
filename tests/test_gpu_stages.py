"""`make gpu` runs every stage, whatever became of those before it, and fails in the end if one did."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

import gpu
from gpu import Stage

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs coreutils")


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A stage of these lines of Python."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "GRACE", 1)

    def of(name: str, *lines: str, limit: int = 30) -> Stage:
        (tmp_path / f"{name}.py").write_text("\n".join((*lines, f"open('ran', 'a').write('{name} ')")))
        return Stage(name, f"{name}.py", expected=1, limit=limit)

    return of


def test_a_stage_that_fails_or_overruns_ends_no_other(stage, tmp_path, capsys):
    slow = "import signal, time", "signal.signal(signal.SIGTERM, signal.SIG_IGN)", "time.sleep(60)"
    stages = stage("first"), stage("red", "raise SystemExit(3)"), stage("slow", *slow, limit=1), stage("last")
    assert gpu.main([], stages) == 1
    assert (tmp_path / "ran").read_text() == "first last "
    summary = [line.partition(" s,")[0].rpartition(", ")[0] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert summary == ["first: ok", "red: FAILED with exit code 3", "slow: OUT OF TIME", "last: ok"]


def test_it_is_well_if_all_stages_are(stage, tmp_path):
    assert gpu.main([], [stage("a"), stage("b")]) == 0
    assert (tmp_path / "ran").read_text() == "a b "


def test_some_stages_may_be_named(stage, tmp_path):
    stages = [stage("a"), stage("b")]
    assert gpu.main(["b"], stages) == 0
    assert (tmp_path / "ran").read_text() == "b "
    with pytest.raises(SystemExit, match="no stage of the name c; there are a, b"):
        gpu.main(["c"], stages)


def test_what_a_stage_started_ends_with_it(stage, tmp_path):
    child = "import pathlib, time; time.sleep(2); pathlib.Path('alive').touch()"
    lines = "import subprocess, sys", f"subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.main([], [stage("parent", *lines, limit=1), stage("next", "import time", "time.sleep(2)")]) == 1
    assert not (tmp_path / "alive").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_well():
    command = [sys.executable, "tests/gpu.py"]
    ended = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr.strip()) == (1, "no GPU here: nothing was run")


def test_measurements_come_after_a_gate_and_before_the_long_tests():
    names = [stage.name for stage in gpu.STAGES]
    assert names[0] == "gate" and names[-1] == "sanitize"
    assert max(names.index(name) for name in ("rows", "head", "sweep", "ppo")) < names.index("tests")
    assert sum(stage.expected for stage in gpu.STAGES) < gpu.NINE_MINUTES
    assert all(stage.expected < stage.limit for stage in gpu.STAGES)


def test_every_stage_is_a_program_that_is_there_and_takes_its_words():
    import contest
    import sweep

    for stage in gpu.STAGES:
        files = [word for word in stage.command.split() if word.endswith(".py")]
        assert all((gpu.ROOT / file).exists() for file in files), stage
    assert contest.parse(sweep.SWEEP, gpu.SHORT.split()).cases == ["logp", "grpo"]
