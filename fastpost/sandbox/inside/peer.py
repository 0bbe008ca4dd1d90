"""Two processes that call each other's functions, with nothing but plain data between them.

A value crosses as plain data (None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict of such)
or as a handle: the number under which the other side keeps it. A `Remote` is such a handle at this side. It can be
called, asked for attributes, items, length, truth, text, and compared or added with another Remote. With plain data
it is never equal and has no order and no sum: an object of the other side cannot say that it is the 3 of a test.

Lines of JSON: {"op": "call", "args": [...], "kwargs": {...}}, answered by {"value": ..., "args": [...]}, the arguments
as they are after the call (for what a function changes in place), or {"error": [name, text]}. Who waits also serves.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import operator
from collections.abc import Callable
from typing import Any, BinaryIO

UNORDERED = {"tuple": tuple, "set": set, "frozenset": frozenset}
OF_PAIRS = ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv")
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    **{f.__name__: f for f in (getattr, setattr, len, iter, next, bool, str, repr, isinstance)},
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem", "neg", *OF_PAIRS)},
}


class Gone(Exception):
    """The other side has ended."""


class Remote:
    """An object of the other side."""

    __slots__ = ("_id", "_peer")

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_id", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._peer.ask("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("setattr", self, name, value)

    def __hash__(self) -> int:
        return self._id

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, Remote) and self._peer.ask("isinstance", instance, self)


def _forward(op: str) -> Callable[..., Any]:
    return lambda self, *args: self._peer.ask(op, self, *args)


def _among_remotes(op: str) -> Callable[..., Any]:
    return lambda self, other: self._peer.ask(op, self, other) if isinstance(other, Remote) else NotImplemented


for _op in ("len", "iter", "next", "bool", "str", "repr", "getitem", "setitem", "delitem", "neg"):
    setattr(Remote, f"__{_op}__", _forward(_op))
for _op in OF_PAIRS:
    setattr(Remote, f"__{_op}__", _among_remotes(_op))


class Peer:
    """One side. `serves`: the operations that the other side may ask for."""

    def __init__(self, reading: BinaryIO, writing: BinaryIO, serves: tuple[str, ...], root: Any = None) -> None:
        self.reading, self.writing, self.serves = reading, writing, serves
        self.kept: list[Any] = [root]  # by number; 0 is where the other side begins

    def root(self) -> Remote:
        """The other side's."""
        return Remote(self, 0)

    def ask(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """What the other side answers, or its error."""
        self._send({"op": op, "args": self._packed(args), "kwargs": {k: self.pack(v) for k, v in kwargs.items()}})
        answer = self._serve_until_answered()
        if "error" in answer:
            raise _error(*answer["error"])
        for given, after in zip(args, answer["args"], strict=True):
            _refill(given, self.unpack(after))
        return self.unpack(answer["value"])

    def serve(self) -> None:
        """Until the other side ends."""
        try:
            self._serve_until_answered()
        except Gone:
            return

    def _serve_until_answered(self) -> dict[str, Any]:
        while True:
            line = self.reading.readline()
            if not line:
                raise Gone("the other side has ended")
            message = json.loads(line)
            if "op" not in message:
                return message
            self._send(self._served(message))

    def _served(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            if message["op"] not in self.serves:
                raise TypeError(f"{message['op']} is not served here")
            args = [self.unpack(one) for one in message["args"]]
            value = OPERATIONS[message["op"]](*args, **{k: self.unpack(v) for k, v in message["kwargs"].items()})
            return {"value": self.pack(value), "args": self._packed(args)}
        except Gone:
            raise
        except Exception as error:
            return {"error": [type(error).__name__, str(error)]}

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self.writing.write(json.dumps(message).encode() + b"\n")
            self.writing.flush()
        except BrokenPipeError:
            raise Gone("the other side has ended") from None

    def _packed(self, values: Any) -> list[Any]:
        return [self.pack(value) for value in values]

    def pack(self, value: Any) -> Any:
        """As JSON can hold it: lists and scalars as they are, anything else with its kind."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list):
            return self._packed(value)
        if isinstance(value, dict):
            return {"dict": [[self.pack(key), self.pack(item)] for key, item in value.items()]}
        for kind, type_ in UNORDERED.items():
            if isinstance(value, type_):
                return {kind: self._packed(value)}
        if isinstance(value, bytes):
            return {"bytes": value.decode("latin-1")}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, Remote):
            return {"yours": value._id}
        self.kept.append(value)
        return {"mine": len(self.kept) - 1}

    def unpack(self, value: Any) -> Any:
        """What `pack` of the other side put in."""
        if isinstance(value, list):
            return [self.unpack(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind in UNORDERED:
            return UNORDERED[kind](self.unpack(inner))
        if kind == "dict":
            return {self.unpack(key): self.unpack(item) for key, item in inner}
        if kind == "bytes":
            return inner.encode("latin-1")
        if kind == "complex":
            return complex(*inner)
        return Remote(self, inner) if kind == "mine" else self.kept[inner]


def _error(name: str, text: str) -> Exception:
    """Of the built-in class of that name, so that a test can catch it."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(TypeError):  # of those that want more arguments
            return kind(text)
    return RuntimeError(f"{name}: {text}")


def _refill(given: Any, after: Any) -> None:
    """What a function of the other side did to a list, dict or set that it was given."""
    if type(given) is list and type(after) is list:
        given[:] = after
    elif (type(given) is dict and type(after) is dict) or (type(given) is set and type(after) is set):
        given.clear()
        given.update(after)
