"""The CUDA row kernels on a CPU: the very same sources, by g++ with tests/emulated in place of CUDA's headers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from cuda_rows import SOURCES, CudaRows

from fastpost.core.rows import TorchRows

HEADERS = Path(__file__).resolve().parent / "emulated"
# Few threads are quick, and three warps that each take two pieces of a row are all there is to a block.
THREADS, COLUMNS = 96, 1536
# Without _FORTIFY_SOURCE, under which no longjmp may go to another stack.
OPTIONS = ("-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-fno-gnu-unique", "-U_FORTIFY_SOURCE")


class Missing(TorchRows):
    """For what the twin does not take: it is to take all that it is asked here, but for a mixture."""

    def fold(self, *_: object) -> None:
        raise AssertionError("left to others")

    grads = fold


def compiler() -> str | None:
    return shutil.which("g++")


def build(
    library: Path, *options: str, sources: Sequence[Path] = SOURCES, threads: int = THREADS, columns: int = COLUMNS
) -> Path:
    sizes = f"-DFOLD_THREADS={threads}", f"-DFOLD_COLUMNS={columns}"
    words = ["g++", "-x", "c++", *OPTIONS, *sizes, *options, "-I", HEADERS, *sources, "-o", library]
    subprocess.run(words, check=True)
    return library


@contextmanager
def last_thread_first(library: Path):
    """The threads of a block run in the other order."""
    order = ctypes.CDLL(str(library)).emulated_order
    order(-1)
    try:
        yield
    finally:
        order(1)


def row_kernels(library: Path, columns: int = COLUMNS) -> CudaRows:
    return CudaRows(lambda: library, Missing(), columns)
