"""Models and checkpoints onto the disk: written aside, fsynced, renamed. A killed process leaves no half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", "adapter_model*", "adapter_config.json")


def _move_into(source: Path, target: Path) -> None:
    """Every file of source into target, each in one step; then weights that no longer belong there go."""
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / file, target / file)
    for pattern in WEIGHTS:
        for path in target.glob(pattern):
            if path.relative_to(target) not in files:
                path.unlink()
    _sync_directory(target)


def _sync(directory: Path) -> None:
    """On the disk, files and the directories that name them."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for path in [*(path for path in directory.rglob("*") if path.is_dir()), directory]:
        _sync_directory(path)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written_aside(directory: str | PathLike[str]) -> Iterator[Path]:
    """A fresh directory to write into, which then becomes `directory`, or moves its files there if that exists.

    A process killed at any moment leaves a new directory absent or whole. In one that exists each file is old or new,
    never half, other files stay, and weights that the new ones replace under other names are removed.
    """
    target = Path(directory)
    aside = target.parent / f".{target.name}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        _sync(aside)
        if target.is_dir() and any(target.iterdir()):
            _move_into(aside, target)
        else:
            os.replace(aside, target)
        _sync_directory(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def save_weights(model: Any, directory: str | PathLike[str]) -> None:
    """The model as safetensors and JSON that `from_pretrained` loads; of one with an adapter, that, as PEFT files."""
    # peft would write the base's embeddings beside an adapter on them, under names that vLLM takes for an adapter's
    alone = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    model.save_pretrained(directory, **alone)


def save_model(model: Any, tokenizer: Any, directory: str | PathLike[str]) -> None:
    """Writes model and tokenizer, whole or not at all."""
    with written_aside(directory) as aside:
        save_weights(model, aside)
        tokenizer.save_pretrained(aside)
