"""What code that nobody has read may use, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "error", "timeout", "cpu", "memory", "output", "files", "threads"]


@dataclass(frozen=True)
class Limits:
    """Of one process. Beside them it has no network, no other process, no environment, and of files the interpreter's
    library to read and one empty directory to write."""

    seconds: float = 10.0  # that pass
    cpu_seconds: int = 5  # that its threads compute
    memory_mb: int = 512  # of address space
    files_mb: int = 16  # that all its files hold
    output_kb: int = 1024  # that it prints

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
                raise ValueError(f"{name} must be above 0, got {value!r}")
            if name != "seconds" and not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, got {value!r}")


@dataclass(frozen=True)
class Outcome:
    """How a process ended: "ok", of itself with "error", or at the limit of that name."""

    status: Status
    stdout: str
    stderr: str
    seconds: float
