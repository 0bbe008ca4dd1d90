"""python worker.py TOLD: a process that has the tools of a run, and runs each call in a child of its own.

TOLD is JSON: where each function is, and the limits of a call. A request is a line of JSON on stdin, {"name",
"arguments"}; the answer a line on stdout, where an empty one comes first: the functions are there. The child has a
session of its own, limits on CPU and memory, and nowhere to print to. It is killed with its session when it has
answered, or has not in time: the next call finds nothing of it.

Of the standard library alone: what this process imports, beside the user's files, each start of it waits for.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import math
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

BLOCK = 1 << 16


def load(file: str, name: str) -> Callable[..., Any]:
    found = importlib.util.spec_from_file_location(os.path.splitext(os.path.basename(file))[0], file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return getattr(module, name)


def answer(function: Callable[..., Any], arguments: dict[str, Any], most: int) -> dict[str, Any]:
    """What a call gives, or how it failed, in at most so many bytes."""
    try:
        value = function(**arguments)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
        status, text = "nothing" if value is None else "ok", str(value)
    except BaseException as error:  # sys.exit, too
        status, text = "error", f"{type(error).__name__}: {error}"
    data = text.encode(errors="replace")
    return {"status": status, "text": data[:most].decode(errors="ignore"), "bytes": len(data)}


def limit(seconds: float, memory_mb: int) -> None:
    """Of this process, once and for all."""
    for kind, most in (
        (resource.RLIMIT_CPU, math.ceil(seconds) + 1),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def child(function: Callable[..., Any], arguments: dict[str, Any], told: dict[str, Any], out: int) -> None:
    """Never returns."""
    try:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nowhere, fd)
        os.closerange(3, out)
        os.closerange(out + 1, 1 << 12)
        limit(told["seconds"], told["memory_mb"])
        line = json.dumps(answer(function, arguments, told["output_bytes"])).encode() + b"\n"
        while line:
            line = line[os.write(out, line) :]
    finally:
        os._exit(0)


def contained(function: Callable[..., Any], arguments: dict[str, Any], told: dict[str, Any]) -> bytes:
    """The line that a child of ours wrote, or one that says what became of it."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(function, arguments, told, theirs)
    os.close(theirs)
    line, late = listened(ours, told["seconds"])
    os.close(ours)
    for kill in (os.killpg, os.kill):  # before its setsid it is no leader of a session yet
        try:
            kill(pid, signal.SIGKILL)
        except OSError:
            continue
    os.waitpid(pid, 0)
    if line.endswith(b"\n"):
        return line
    status = "timeout" if late else "died"
    return json.dumps({"status": status, "text": "", "bytes": 0}).encode() + b"\n"


def listened(fd: int, seconds: float) -> tuple[bytes, bool]:
    """A line, if it came in time."""
    line, until = b"", time.monotonic() + seconds
    while not line.endswith(b"\n"):
        if not select.select([fd], [], [], max(0.0, until - time.monotonic()))[0]:
            return line, True
        part = os.read(fd, BLOCK)
        if not part:
            return line, False
        line += part
    return line, False


def main() -> None:
    told = json.loads(sys.argv[1])
    sys.path[0] = os.getcwd()  # in the place of the folder of this file, whose modules are not the user's
    replies, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    functions = {name: load(*where) for name, where in told["functions"].items()}
    os.write(replies, b"\n")
    while request := sys.stdin.buffer.readline():
        asked = json.loads(request)
        line = contained(functions[asked["name"]], asked["arguments"], told)
        while line:
            line = line[os.write(replies, line) :]


if __name__ == "__main__":
    main()
