"""Contestants in processes of their own, that do what they are told in turns.

None finds memory, a thread pool or a library's state as another left it, and a slow moment of the machine falls on all.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

Made = TypeVar("Made")
Answer = TypeVar("Answer")


def _serve(pipe: Connection, make: Callable[[], Any]) -> None:
    """Makes the contestant, then does orders until there is none. Answers with a result and with what went wrong."""
    made: list[Any] = []
    for order in iter(pipe.recv, None):
        try:
            made = made or [make()]
            pipe.send((order(made[0]), None))
        except Exception as error:
            traceback.print_exc()
            pipe.send((None, f"{type(error).__name__}: {error}"))


class Contestant(Generic[Made]):
    """A process that `make` is called in; it and every order must be what pickle can name."""

    def __init__(self, make: Callable[[], Made]):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()

    def told(self, order: Callable[[Made], Answer]) -> Answer:
        """What the order returns there. RuntimeError where it does not return."""
        try:
            self._pipe.send(order)
            answer, fault = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(f"the process ended with exit code {self._process.exitcode}") from None
        if fault is not None:
            raise RuntimeError(fault)
        return answer

    def dismissed(self) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join()
        self._pipe.close()
