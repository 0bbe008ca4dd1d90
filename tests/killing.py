"""kill -9, for tests: a command as a process of its own, and its end at a moment that the test chooses."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FASTPOST = ("-m", "fastpost.cli")
PATIENCE = 120.0  # seconds, for the moment to come


def begun(words: Sequence[str], directory: Path, program: Sequence[str] = FASTPOST) -> subprocess.Popen:
    """`fastpost` with these words, or another program, in this directory."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *program, *words]
    return subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen) -> str:
    """What it printed, once it has ended well."""
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return printed


def killed(process: subprocess.Popen, now: Callable[[], bool], draw: random.Random) -> None:
    """Soon after `now` says so: in the middle of something, of a write perhaps. It must not have ended before."""
    until = time.monotonic() + PATIENCE
    while process.poll() is None and not now() and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(draw.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said


def flags_of(fields: Mapping[str, object]) -> list[str]:
    listed = {name: value if isinstance(value, tuple) else (value,) for name, value in fields.items()}
    return [word for name, values in listed.items() for word in (f"--{name}", *map(str, values))]


def lines(*files: Path) -> int:
    """Of files, those that are not there yet included."""
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())
