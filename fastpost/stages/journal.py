"""Finished work on the disk, a line of JSON each: [key, value], in the order in which it was done.

A stage that is killed and begun again by the same command finds there what it need not do again. The first line has
the facts that decide results, and what is in the files that they name: rows, functions, weights; a journal of others is
refused by the first that differs. A line that was being written when the process died is no line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

LARGE = (".safetensors", ".bin", ".arrow")


class Journal:
    """What is done, by key; `add` puts more on the disk before it returns."""

    def __init__(self, file: Path, facts: Mapping[str, Any]):
        self.file, facts = file, json.loads(json.dumps({**facts, **contents(facts)}))
        file.parent.mkdir(parents=True, exist_ok=True)
        whole, lines = _lines(file)
        if lines:
            _check(file, lines[0], facts)
        if file.exists():
            os.truncate(file, whole)
        if not lines:
            self._write([facts])
        self._done: dict[str, Any] = dict(lines[1:])

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __getitem__(self, key: str) -> Any:
        return self._done[key]

    def __len__(self) -> int:
        return len(self._done)

    def add(self, done: Mapping[str, Any]) -> None:
        """Work that is done now."""
        self._write([[key, value] for key, value in done.items()])
        self._done |= json.loads(json.dumps(done))

    def _write(self, lines: list[Any]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self.file.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def _lines(file: Path) -> tuple[int, list[Any]]:
    """The whole lines of a file, and how many bytes they are; of one that ends within its first line, none."""
    if not file.exists():
        return 0, []
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        return len(whole), [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise ValueError(f"{file} is not what a stage wrote: remove it, and the work is done again") from None


def _check(file: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError for the first fact that differs."""
    for name in dict.fromkeys([*then, *now]):
        if then.get(name) != now.get(name):
            raise ValueError(
                f"{file} holds work that was done with {name} {then.get(name)!r}, not {now.get(name)!r}: go on with "
                "that, or choose another output_dir"
            )


def contents(facts: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what the facts name, alone or in a list: a file, a function in one, a directory of weights."""
    values = [each for x in facts.values() for each in (x if isinstance(x, list | tuple) else [x])]
    texts = [each for each in values if each and isinstance(each, str)]
    paths = dict.fromkeys(path for text in texts for path in (text, text.rpartition(":")[0]) if os.path.exists(path))
    return {f"the contents of {path}": digest for path in paths if (digest := _digest(Path(path)))}


def _digest(path: Path) -> str:
    """Large files, which a directory has, by size and time; nothing for a directory of others."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    found = [(file.name, file.stat()) for file in sorted(path.iterdir()) if file.suffix in LARGE]
    said = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in found]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16] if said else ""


def through(
    journal: Journal,
    name: str,
    n: int,
    size: int,
    work: Callable[[Sequence[int]], list[Any]],
    done: Callable[[Any], bool] = lambda value: True,  # whether it need not be done again
) -> list[Any]:
    """What work gives for 0..n-1, so many at a time, each kept in the journal as name/i when it is done."""
    keys, undone = [f"{name}/{i}" for i in range(n)], {}
    left = [i for i in range(n) if keys[i] not in journal]
    for first in range(0, len(left), size):
        batch = left[first : first + size]
        found = {keys[i]: value for i, value in zip(batch, work(batch), strict=True)}
        journal.add({key: value for key, value in found.items() if done(value)})
        undone |= {key: value for key, value in found.items() if key not in journal}
    return [undone[key] if key in undone else journal[key] for key in keys]
