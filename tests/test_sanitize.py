"""What `make gpu` runs of compute-sanitizer: both tools, on our kernels; an error is one, and its absence is not."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

import sanitize


@pytest.fixture
def pretended(tmp_path, monkeypatch) -> Path:
    """A compute-sanitizer that writes its words down and finds an error in what $FINDS names."""
    program = tmp_path / "compute-sanitizer"
    words = f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> {tmp_path}/words'
    program.write_text(f'#!/bin/sh\n{words}\necho "========= $SAYS"\n[ "$2" != "$FINDS" ]\n')
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sanitize, "launch_all", lambda device: None)
    return tmp_path / "words"


def test_both_tools_watch_every_kernel(pretended):
    assert sanitize.main([]) == 0
    words = pretended.read_text().splitlines()
    assert [line.split()[:3] for line in words] == [["1", "--tool", tool] for tool in ("memcheck", "racecheck")]
    names = sanitize.kernel_names()
    assert {"_fold_kernel", "_mixture_kernel", "_grads_kernel", "fold_rows_kernel", "grads_rows_kernel"} <= set(names)
    assert all(f"--kernel-name kns={name}" in line for name in names for line in words)
    assert all("--error-exitcode 1" in line and line.endswith("sanitize.py --launch") for line in words)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_an_error_is_a_failure(pretended, monkeypatch, tool):
    monkeypatch.setenv("FINDS", tool)
    assert sanitize.main([]) == 1
    assert len(pretended.read_text().splitlines()) == 2, "the other tool runs all the same"


def test_a_device_that_cannot_be_watched_is_said_and_is_no_failure(pretended, monkeypatch, capsys):
    monkeypatch.setenv("FINDS", "racecheck")
    monkeypatch.setenv("SAYS", "Error: Device not supported. Please refer to the documentation")
    assert sanitize.main([]) == 0
    verdicts = [line for line in capsys.readouterr().out.splitlines() if line.startswith("compute-sanitizer")]
    assert verdicts == [
        "compute-sanitizer, memcheck: no error",
        "compute-sanitizer, racecheck: does not take this device, skipped",
    ]


def test_without_the_tool_it_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert sanitize.main([]) == 0
    assert capsys.readouterr().out == "compute-sanitizer: not found, skipped\n"


def test_what_is_launched_runs_here_too():
    sanitize.launch(torch.device("cpu"))
