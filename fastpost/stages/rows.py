"""What a stage leaves: files that are whole or not there, and a table for who ran it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, as every verb reads them."""
    write_bytes(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def write_json(file: Path, value: Any) -> None:
    write_bytes(file, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(file: Path, data: bytes) -> None:
    """Aside, fsynced, renamed."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with aside.open("wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(aside, file)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of one kind, their names as a head, in columns."""
    rows = [{name: _shown(value) for name, value in row.items()} for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    widths = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in names}
    lines = [dict(zip(names, names, strict=True)), *rows]
    return "\n".join("  ".join(line.get(name, "").rjust(widths[name]) for name in names).rstrip() for line in lines)


def _shown(value: Any) -> str:
    """Numbers at three digits; nothing where there is none."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
