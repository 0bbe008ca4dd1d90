"""What a confined process does: run a program, serve an answer's functions, or hold its tests."""

from __future__ import annotations

import builtins
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any, BinaryIO

from peer import OPERATIONS, Peer

BUILTINS = frozenset(dir(builtins))


def _executed(source: str, name: str, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """The names of a module, that is there by its own name, as classes want of theirs."""
    module = sys.modules[name] = ModuleType(name)
    module.__dict__.update(namespace or {})
    exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    return module.__dict__


def program(payload: dict[str, Any]) -> None:
    """A program, as the command line would run it."""
    sys.argv = ["program"]
    _executed(payload["source"], "__main__")


def _private() -> tuple[BinaryIO, BinaryIO]:
    """stdin and stdout for ourselves; what the code prints goes to stderr, and what it reads is empty."""
    reading, writing = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return os.fdopen(reading, "rb"), os.fdopen(writing, "wb")


def answer(payload: dict[str, Any], requests: int, replies: int) -> None:
    """An answer's functions, for whoever asks. It never sees the tests, and can say no more than what they return."""
    _private()
    module = _executed(payload["source"], "answer")
    names = {name: value for name, value in module.items() if not isinstance(value, ModuleType)}
    peer = Peer(os.fdopen(requests, "rb"), os.fdopen(replies, "wb"), tuple(OPERATIONS), lambda: names)
    peer.serve()


def tests(payload: dict[str, Any], requests: int, replies: int) -> None:
    """Tests, one after another in one namespace, with the answer's names in it; a line of verdict each."""
    _, verdicts = _private()
    peer = Peer(os.fdopen(replies, "rb"), os.fdopen(requests, "wb"), ("call",))
    names = peer.root()().items()
    # An `all` of the answer's own, which says yes to everything, is not for the tests to use.
    given = {name: value for name, value in names if not (name.startswith("_") or name in BUILTINS)}
    _executed("", "solution", given)  # as `from solution import add` has it
    module = _executed(payload["setup"], "tests", given)
    for i, source in enumerate(payload["tests"]):
        verdicts.write(b"1\n" if _passed(source, f"<test {i}>", module) else b"0\n")
        verdicts.flush()


def _passed(source: str, name: str, module: dict[str, Any]) -> bool:
    """Whether it runs to its end, and so does each function that it names test_..., as pytest would call it."""
    before = dict(module)
    try:
        exec(compile(source, name, "exec"), module)
        for key, value in list(module.items()):
            if key.startswith("test_") and value is not before.get(key):
                value()
        return True
    except BaseException:
        traceback.print_exc()
        return False


ROLES: dict[str, Callable[..., None]] = {"program": program, "answer": answer, "tests": tests}
