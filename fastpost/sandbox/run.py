"""The sandbox's doors: whether it is there, a program's run, and an answer against unit tests."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from fastpost.sandbox.inside import landlock
from fastpost.sandbox.limits import Limits, Outcome, Status
from fastpost.sandbox.process import start, watch

MACHINES = ("x86_64", "aarch64")
GRACE = 1.0  # seconds in which an answer ends by itself, once nobody asks it any more


@dataclass(frozen=True)
class Tested:
    """An answer against tests."""

    passed: tuple[bool, ...]  # one a test; a test that was not reached is not passed
    status: Status  # of the answer's process
    stderr: str  # of both


def run(source: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """A Python program, with this to read on stdin."""
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        payload = {"source": source}
        return watch(start("program", payload, limits or Limits(), folder, stdin=stdin.encode(errors="replace")))


def run_tests(source: str, tests: Sequence[str], limits: Limits | None = None, *, setup: str = "") -> Tested:
    """Tests in Python, `assert add(1, 2) == 3`, on the functions and classes of `source`, after the code `setup`.

    The answer and the tests are two processes: the answer never sees what is expected, and the verdict is not its own.
    """
    limits = limits or Limits()
    requests, replies = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as one, tempfile.TemporaryDirectory(prefix="sandbox-") as other:
        try:
            answer = start("answer", {"source": source}, limits, one, fds=(requests[0], replies[1]))
            judge = start("tests", {"setup": setup, "tests": list(tests)}, limits, other, fds=(requests[1], replies[0]))
        finally:
            for end in (*requests, *replies):  # each process has its own: where one ends, the other must see it
                os.close(end)
        with ThreadPoolExecutor(1) as thread:
            served = thread.submit(watch, answer)
            judged = watch(judge)
            answered = wait([served], GRACE).done
            answer.kill()
            ended = served.result()
    verdicts = judged.stdout.split()
    passed = tuple(i < len(verdicts) and verdicts[i] == "1" for i in range(len(tests)))
    return Tested(passed, ended.status if answered else judged.status, ended.stderr + judged.stderr)


def check() -> None:
    """Raises a ValueError that says what is missing where code cannot be confined. Runs a program to see."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        here = f"{platform.system()} on {platform.machine()}"
        raise ValueError(f"code that a model wrote is run on Linux on {' or '.join(MACHINES)} only, this is {here}")
    if landlock.version() < 1:
        raise ValueError(
            "code that a model wrote needs Landlock, to keep it from files: Linux 5.13 or newer, `landlock` in the "
            "kernel's lsm= list, and a container whose seccomp profile lets it through"
        )
    outcome = run("print('confined')")
    if outcome.stdout != "confined\n":
        raise ValueError(
            f"the sandbox does not work on this machine ({outcome.status}): {outcome.stderr[-500:].strip()}"
        )
