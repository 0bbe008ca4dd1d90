"""What a teacher said of a data set, written once: who has the directory needs no teacher.

  PART/00000.safetensors ...  ids (N, K) int32, logp (N, K) float32: of each predicted token of some examples, in their
                              order, the K likeliest tokens and their log-probabilities, the likeliest first
  PART/teacher.json           what they are of: the data by their tokens and masks, the tokenizer, the teacher

A part is written aside and renamed: it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpost.models.adapters import base_of, is_adapter
from fastpost.models.saving import written_aside
from fastpost.packing import Example
from fastpost.trainers.log import say

FACTS = "teacher.json"
SHARD = 256 << 20  # bytes of a file
NUMBER = 8  # bytes of an id and its log-probability

TopTokens = tuple[Tensor, Tensor]  # ids (n, K) int64, logp (n, K)


@dataclass(frozen=True)
class Facts:
    """What a part of a cache is of."""

    tokenizer: str  # a digest, as the next two
    data: str
    teacher: str | None  # None: it came from a hub
    teacher_model: str
    vocabulary: int
    temperature: float
    top_k: int
    tokens: int


def is_there(part: Path) -> bool:
    return (part / FACTS).is_file()


# ---- digests ----


def digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def digest_of_data(examples: Sequence[Example]) -> str:
    """Of their tokens, and of which of them are predicted."""
    flat = chain.from_iterable(
        (array("q", [len(e.input_ids), *e.input_ids]).tobytes(), bytes(e.loss_mask)) for e in examples
    )
    return digest(flat)


def digest_of_tokenizer(tokenizer: Any) -> str:
    """Of its words and their numbers."""
    return digest([json.dumps(sorted(tokenizer.get_vocab().items())).encode()])


def digest_of_teacher(path: str) -> str | None:
    """Of the weights in a directory, and of those of its base where they are an adapter; None: of the hub."""
    directories = [Path(path).expanduser(), *([Path(base_of(path)).expanduser()] if is_adapter(path) else [])]
    files = [file for each in directories for file in sorted(each.glob("*.safetensors"))]
    return digest(map(_hash, files)) if files else None


def _hash(file: Path) -> bytes:
    with file.open("rb") as bytes_:
        return hashlib.file_digest(bytes_, "sha256").digest()


# ---- writing ----


def write(part: Path, facts: Facts, shards: Iterable[Sequence[TopTokens]]) -> None:
    """All files of a part, and what they are of. Says how large it is before it begins."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    size = facts.tokens * facts.top_k * NUMBER
    say(f"teacher_cache {part}: {facts.top_k} tokens in each of {facts.tokens} places, {size / 1e9:.3g} GB")
    _check_room(part, size)
    try:
        with written_aside(part) as aside:
            for number, shard in enumerate(shards):
                ids, logp = (torch.cat(each) for each in zip(*shard, strict=True))
                save_file({"ids": ids.int(), "logp": logp.float()}, aside / _name(number))
            (aside / FACTS).write_text(json.dumps(asdict(facts), indent=2), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"teacher_cache {part} could not be written: {error}") from error


def shards_of(examples: Sequence[Example], top_k: int) -> list[list[int]]:
    """Which examples share a file: as many, in their order, as it has room for."""
    room, shards, used = max(1, SHARD // (NUMBER * top_k)), [], 0
    for i, example in enumerate(examples):
        count = len(example.predicted)
        if not shards or used + count > room:
            shards.append([])
            used = 0
        shards[-1].append(i)
        used += count
    return shards


def _name(number: int) -> str:
    return f"{number:05}.safetensors"


def _check_room(part: Path, size: int) -> None:
    there = next(path for path in part.absolute().parents if path.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise ValueError(
            f"teacher_cache {part} would take {size / 1e9:.3g} GB, and {there} has {free / 1e9:.3g} GB left: lower "
            "teacher_top_k, or choose another directory"
        )


# ---- reading ----


def read_facts(part: Path) -> Facts:
    try:
        return Facts(**json.loads((part / FACTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"teacher_cache {part} cannot be read: {error}") from error


def check(
    part: Path, facts: Facts, tokenizer: Any, examples: Sequence[Example], temperature: float, top_k: int
) -> None:
    """ValueError for a cache of anything else."""
    here = sum(len(example.predicted) for example in examples)
    wrong = {
        "of another tokenizer": facts.tokenizer != digest_of_tokenizer(tokenizer),
        f"of other data, which predict {facts.tokens} tokens, and these {here}": facts.data != digest_of_data(examples),
        f"of temperature {facts.temperature:g}, and temperature is {temperature:g}": facts.temperature != temperature,
        f"of the {facts.top_k} likeliest tokens, and teacher_top_k is {top_k}": facts.top_k < top_k,
    }
    for what, so in wrong.items():
        if so:
            raise ValueError(f"teacher_cache {part} is {what}: choose another directory for this one, or remove it")


def readers(part: Path, examples: Sequence[Example], facts: Facts, top_k: int) -> list[Callable[[], TopTokens]]:
    """For each example what reads its tokens from the disk."""
    found = []
    for number, rows in enumerate(shards_of(examples, facts.top_k)):
        file, start = part / _name(number), 0
        _check_file(part, file, sum(len(examples[i].predicted) for i in rows), facts.top_k)
        for i in rows:
            stop = start + len(examples[i].predicted)
            found.append(partial(_read, file, start, stop, top_k))
            start = stop
    return found


def _check_file(part: Path, file: Path, tokens: int, top_k: int) -> None:
    """ValueError for one that is cut off, or another; what is in it is read when its examples are."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ValueError(f"teacher_cache {part} is spoilt: {file.name} is missing")
    try:
        with safe_open(file, "pt") as shard:
            shapes = [shard.get_slice(name).get_shape() for name in ("ids", "logp")]
    except (OSError, SafetensorError) as error:
        raise ValueError(f"teacher_cache {part} is spoilt: {file.name} cannot be read: {error}") from error
    if shapes != [[tokens, top_k]] * 2:
        raise ValueError(f"teacher_cache {part} is spoilt: {file.name} holds {shapes[0]}, and not {[tokens, top_k]}")


def _read(file: Path, start: int, stop: int, top_k: int) -> TopTokens:
    from safetensors import safe_open

    with safe_open(file, "pt") as shard:
        ids, logp = (shard.get_slice(name)[start:stop, :top_k] for name in ("ids", "logp"))
    return ids.long(), logp
