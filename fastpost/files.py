"""Files -> rows: .jsonl, .json, .parquet, or what `datasets` saved; and YAML. What is wrong is named with its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from fastpost.types import nearest

Row = dict[str, Any]
Rows = Any  # a list of rows or a datasets.Dataset: both have len(), iteration over dicts, indexing by an integer
SUFFIXES = (".jsonl", ".json", ".parquet")


def _jsonl(file: Path) -> list[Row]:
    """One object a line; blank lines are skipped."""
    rows = []
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if line.strip():
            rows.append(_object(_parsed(line, f"{file}, line {number}"), f"{file}, line {number}"))
    return rows


def _json(file: Path) -> list[Row]:
    """One array of objects."""
    rows = _parsed(file.read_bytes(), str(file))
    if not isinstance(rows, list):
        raise ValueError(f"{file} must hold one array of objects, got {type(rows).__name__}: is it .jsonl?")
    return [_object(row, f"{file}, element {i}") for i, row in enumerate(rows)]


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise ValueError(f"{where}{line}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start + 1} is not UTF-8 ({error.reason})") from None


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f'{where}: a row must be an object like {{"prompt": ...}}, got {type(row).__name__}')
    return row


def _parquet(file: Path) -> Rows:
    import datasets
    import pyarrow
    from pyarrow import parquet

    try:
        return datasets.Dataset(parquet.read_table(file))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is not a Parquet file: {error}") from None


def _saved_dataset(directory: Path) -> Rows:
    import datasets

    if not any((directory / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(f"dataset {str(directory)!r} is a directory, but not one that datasets' save_to_disk wrote")
    rows = datasets.load_from_disk(str(directory))
    if isinstance(rows, datasets.DatasetDict):
        raise ValueError(
            f"dataset {str(directory)!r} holds the splits {sorted(rows)}: pass the directory of one of them"
        )
    return rows


def read_rows(path: str | PathLike[str]) -> Rows:
    """The rows of a .jsonl, .json or .parquet file, or of a directory that `datasets` saved."""
    file = Path(path).expanduser()
    if not file.exists():
        near = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        raise ValueError(f"dataset {str(path)!r} does not exist{nearest(file.name, near)}")
    if file.is_file() and file.suffix not in SUFFIXES:
        raise ValueError(
            f"dataset {str(path)!r} must end in {', '.join(SUFFIXES)}, or be a directory saved by datasets"
        )
    read = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    rows = _saved_dataset(file) if file.is_dir() else read[file.suffix](file)
    if not len(rows):
        raise ValueError(f"{path} has no rows")
    return rows


# ---- YAML ----


def read_yaml(path: str | PathLike[str], what: str) -> Any:
    """What a YAML file has, safe-loaded; `what` says in messages what it is. Of a key that is there twice YAML would
    take the last without a word."""
    import yaml

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        twice = next(_repeated(yaml.compose(text, yaml.SafeLoader)), None)
        found = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the {what} {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if twice is not None:
        raise ValueError(f"{path}, line {twice.start_mark.line + 1}: the key {twice.value!r} is there a second time")
    return found


def _repeated(root: Any) -> Iterator[Any]:
    """Nodes of keys that are in their mapping already."""
    left, seen = [root], set()
    while left:
        node = left.pop()
        if node is None or isinstance(node.value, str) or id(node) in seen:
            continue
        seen.add(id(node))  # an alias is the node itself
        pairs = [pair for pair in node.value if isinstance(pair, tuple)]
        keys = set()
        for key, _ in pairs:
            if (key.tag, str(key.value)) in keys:
                yield key
            keys.add((key.tag, str(key.value)))
        left += [value for _, value in pairs] or node.value
