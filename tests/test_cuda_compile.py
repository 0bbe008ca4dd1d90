"""csrc/fold.cu and csrc/grads.cu, every instantiation that is launched, compiled by nvcc for GPUs that are not here: no
spills, shared memory to spare, and every tile read and written 16 bytes at a time.

Each check has a control that must trip it: too few registers, and an address that is never found to be on 16 bytes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import cuda_rows
import pytest

pytestmark = pytest.mark.skipif(cuda_rows.find_nvcc() is None, reason="needs nvcc")

CSRC = cuda_rows.ROOT / "csrc"
TARGETS = ("sm_80", "sm_90a")
KINDS, SHAPES, OUTS = range(3), ("b0", "b1"), {"v": "void", "f": "float", "13__nv_bfloat16": "bf16"}
FOLDS, GRADS = len(KINDS) * len(SHAPES) * len(OUTS), len(KINDS) * len(SHAPES) * (len(OUTS) - 1)


@dataclass(frozen=True)
class Kernel:
    """An instantiation, and what ptxas and its PTX say of it."""

    kind: int
    shaped: bool
    out: str
    stack: int  # bytes: 0 unless registers did not suffice
    spilled: int  # bytes
    shared: int  # bytes
    wide_loads: int
    wide_stores: int


def compile(source: Path, target: str, folder: Path, threads: int = cuda_rows.THREADS[0]) -> list[Kernel]:
    words = [
        *cuda_rows.NVCC_OPTIONS,
        *cuda_rows.gencode(target),
        f"-DFOLD_THREADS={threads}",
        f"-DFOLD_COLUMNS={cuda_rows.COLUMNS}",
    ]
    keeps = ["-cubin", "-Xptxas=-v", "--keep", "--keep-dir", folder, "-o", folder / "kernels.cubin"]
    done = subprocess.run([cuda_rows.find_nvcc(), *words, *keeps, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return read(done.stderr, (folder / f"{source.stem}.ptx").read_text())


def read(report: str, ptx: str) -> list[Kernel]:
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}\n", ptx, re.DOTALL))
    return [kernel(*part.split("'", 1), bodies) for part in report.split("Compiling entry function '")[1:]]


def kernel(name: str, report: str, bodies: dict[str, str]) -> Kernel:
    kind, shaped, out = re.search(r"KindE(\d)EL(b\d)E(\w+?)EEv", name).groups()
    stack, *spilled = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill)", report))
    shared = re.search(r"(\d+) bytes smem", report)
    loads, stores = (len(re.findall(rf"\b{word}\.global\.v4\.", bodies[name])) for word in ("ld", "st"))
    return Kernel(
        int(kind), shaped == "b1", OUTS[out], stack, sum(spilled), int(shared[1]) if shared else 0, loads, stores
    )


def assert_fast(kernels: list[Kernel], expected: int, eights: int) -> None:
    """Each instantiation fits; 8 columns, of which a thread has `eights`, are two loads of each tile and each bias, and
    two stores in fp32 or one in bf16."""
    assert len({(k.kind, k.shaped, k.out) for k in kernels}) == len(kernels) == expected
    for k in kernels:
        assert k.stack == 0 and k.spilled == 0 and k.shared <= 4 << 10, k
        assert k.wide_loads == eights * 2 * (1 + (k.kind == cuda_rows.BOTH)) * (1 + k.shaped), k
        assert k.wide_stores == eights * {"void": 0, "bf16": 1, "float": 2}[k.out], k


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "threads", [cuda_rows.THREADS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in cuda_rows.THREADS[1:])]
)
def test_a_fold_has_room_and_moves_16_bytes_at_a_time(threads, target, tmp_path):
    assert_fast(compile(CSRC / "fold.cu", target, tmp_path, threads), FOLDS, cuda_rows.COLUMNS // threads // 8)


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_have_room_and_move_16_bytes_at_a_time(target, tmp_path):
    assert_fast(compile(CSRC / "grads.cu", target, tmp_path), GRADS, eights=1)


def edited(file: str, before: str, after: str, folder: Path) -> Path:
    """A copy of the sources with another text in one of them."""
    for source in CSRC.glob("*.cu*"):
        shutil.copy(source, folder)
    text = (folder / file).read_text()
    assert text.count(before) == 1
    (folder / file).write_text(text.replace(before, after))
    return folder


def test_kernels_without_room_are_seen_to_spill(tmp_path):
    """Eight blocks of 256 threads at once leave each thread 32 registers."""
    bounds = "__launch_bounds__(kGradsThreads{})"
    folder = edited("grads.cu", bounds.format(""), bounds.format(", 8"), tmp_path)
    kernels = compile(folder / "grads.cu", "sm_80", folder)
    assert max(k.spilled for k in kernels) > 0 and max(k.stack for k in kernels) > 0


def test_an_address_never_found_to_be_on_16_bytes_is_seen_to_be_read_in_pieces(tmp_path):
    folder = edited("tile.cuh", "reinterpret_cast<uintptr_t>(p) % 16 == 0", "false", tmp_path)
    kernels = compile(folder / "grads.cu", "sm_80", folder)
    assert {(k.wide_loads, k.wide_stores) for k in kernels} == {(0, 0)}
