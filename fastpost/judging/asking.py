"""Requests -> replies, each kept on the disk as it comes.

A reply is found again by the SHA-256 of what was asked and of whom, so a run that was killed, and another run, ask for
nothing twice. A reply that never came is not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastpost.judging.wording import Request


@dataclass(frozen=True)
class Reply:
    """What came of a request."""

    text: str = ""
    logp: Mapping[str, float] | None = None  # of the options, where they were told
    error: str | None = None  # why nothing came


# Each reply with the number of its request, as it comes.
Ask = Callable[[Sequence[Request]], Iterator[tuple[int, Reply]]]


@dataclass(frozen=True)
class Cache:
    """Replies in files of a directory; None: none are kept."""

    directory: Path | None
    facts: Mapping[str, Any]  # who was asked, and how

    def key(self, request: Request) -> str:
        return hashlib.sha256(json.dumps([self.facts, asdict(request)], sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Reply | None:
        """A file that cannot be read is none."""
        if self.directory is None:
            return None
        try:
            return Reply(**json.loads(self._file(key).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def put(self, key: str, reply: Reply) -> None:
        if self.directory is None or reply.error is not None:
            return
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        aside.write_text(json.dumps(asdict(reply)), encoding="utf-8")
        os.replace(aside, file)

    def _file(self, key: str) -> Path:
        assert self.directory is not None
        return self.directory / key[:2] / f"{key}.json"


def replies(ask: Ask, cache: Cache, requests: Sequence[Request]) -> list[Reply]:
    """One to each request, in their order; equal ones are asked once."""
    keys = [cache.key(request) for request in requests]
    found = {key: reply for key in dict.fromkeys(keys) if (reply := cache.get(key)) is not None}
    left = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
    names = list(left)
    for i, reply in ask(list(left.values())):
        cache.put(names[i], reply)
        found[names[i]] = reply
    return [found[key] for key in keys]
