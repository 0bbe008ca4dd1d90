"""csrc/fold.cu and csrc/grads.cu, compiled by nvcc for the GPU that is here and called through ctypes.

A candidate for the place of the Triton row kernels, which nothing in the library calls: `rows.py` times the two beside
each other. What the twin does not compute it leaves to the kernels that it is given: a mixture, a statistic that is new
to it, a tile wider than its blocks hold, a dtype other than fp32 (out: or bf16).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from fastpost.core.rows import Shape, TorchRows

ROOT = Path(__file__).resolve().parent.parent
SOURCES = tuple(ROOT / "csrc" / name for name in ("fold.cu", "grads.cu"))
HEADERS = tuple(ROOT / "csrc" / name for name in ("launch.cuh", "sums.cuh", "tile.cuh"))
NVCC_OPTIONS = ("-std=c++17", "-O3", "-fmad=false")
LIBRARY = ("-shared", "-Xcompiler", "-fPIC")
TWIN = "cuda"  # with which its names begin
COLUMNS = 8192  # of a tile, at the most
THREADS = (512, 1024)  # of a fold's block: the sizes that are tried

# csrc/sums.cuh: Kind, and csrc/grads.cu: Costly.
ENTROPY, OWN, BOTH = range(3)
OF_P, OF_BOTH = {"log_sum_sq", "mean_logp", "logp@1"}, {"reverse_kl", "forward_kl", "jsd"}
KNOWN = {"logp", "lse", "top1", "entropy"} | OF_P | OF_BOTH
COSTLY = {"log_sum_sq": 1, "logp@1": 2, "forward_kl": 4, "jsd": 8}


class Side(Structure):
    """As in csrc/tile.cuh."""

    _fields_ = (("raw", c_void_p), ("stride", c_int64), ("bias", c_void_p), ("scale", c_float), ("softcap", c_float))


class Tile(Structure):
    """As in csrc/tile.cuh."""

    _fields_ = (
        ("p", Side),
        ("q", Side),
        ("target", c_void_p),
        ("inverse_temperature", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("start", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("out_is_bf16", c_int32),
    )


def find_nvcc() -> str | None:
    beside = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join([*beside, "/usr/local/cuda/bin"]))


def architecture(capability: tuple[int, int]) -> str:
    """sm_90a has what sm_90 lacks."""
    return "sm_" + "".join(map(str, capability)) + ("a" if capability == (9, 0) else "")


def gencode(target: str) -> tuple[str, ...]:
    return "-gencode", f"arch={target.replace('sm', 'compute')},code={target}"


def missing(device: torch.device) -> str | None:
    """What keeps the twin from being compiled for this device, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "a GPU of NVIDIA's"
    return None if find_nvcc() else "nvcc (CUDA_HOME names another place than PATH)"


def build(threads: int, device: torch.device) -> Path:
    """The library for this GPU, compiled unless it is there and no older than its sources."""
    target, nvcc = architecture(torch.cuda.get_device_capability(device)), find_nvcc()
    library = ROOT / "build" / "cuda" / f"rows-{target}-{threads}.so"
    if library.exists() and library.stat().st_mtime > max(file.stat().st_mtime for file in (*SOURCES, *HEADERS)):
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    options = *NVCC_OPTIONS, *LIBRARY, *gencode(target), f"-DFOLD_THREADS={threads}", f"-DFOLD_COLUMNS={COLUMNS}"
    done = subprocess.run([nvcc, *options, *SOURCES, "-o", library], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc: {done.stderr.strip()}")
    return library


def kind(wants: AbstractSet[str], dense: bool) -> int:
    return BOTH if dense else OWN if wants & OF_P else ENTROPY


class CudaRows:
    """`fold`, `mixture` and `grads` of fastpost.core.rows.TorchRows, with its arguments; `others` does what is left."""

    def __init__(self, build: Callable[[], Path], others: TorchRows, columns: int = COLUMNS):
        self._build, self._others, self._columns = build, others, columns

    @cached_property
    def _library(self) -> ctypes.CDLL:
        """Compiled by the first call, as Triton's are."""
        library = ctypes.CDLL(str(self._build()))
        library.fastpost_fold.argtypes = POINTER(Tile), c_int, c_void_p, c_void_p
        library.fastpost_grads.argtypes = POINTER(Tile), c_int, c_void_p, c_int, c_float, c_float, c_void_p
        return library

    def fold(
        self,
        state: Tensor,  # (14, R)
        tile: Tensor,  # (R, B)
        target: Tensor,  # (R,)
        start: int,
        shape: Shape,
        inverse_temperature: Tensor | None,  # (R,)
        wants: AbstractSet[str],
        tile_q: Tensor | None = None,  # (R, B)
        shape_q: Shape | None = None,
        out: Tensor | None = None,  # (R, B)
    ) -> None:
        if not self._takes(tile, out, wants):
            return self._others.fold(
                state, tile, target, start, shape, inverse_temperature, wants, tile_q, shape_q, out
            )
        call = _Call(tile, target, start, shape, inverse_temperature, out, tile_q, shape_q)
        assert state.is_contiguous() and state.shape[1] == len(tile)
        rest = kind(wants, tile_q is not None), state.data_ptr(), call.stream
        _check(self._library.fastpost_fold(byref(call.tile), *rest))

    def mixture(
        self,
        state: Tensor,
        tile: Tensor,
        shape: Shape,
        inverse_temperature: Tensor | None,
        tile_q: Tensor,
        shape_q: Shape,
        beta: float,
    ) -> None:
        self._others.mixture(state, tile, shape, inverse_temperature, tile_q, shape_q, beta)

    def grads(
        self,
        tile: Tensor,  # (R, B)
        target: Tensor,  # (R,)
        start: int,
        shape: Shape,
        inverse_temperature: Tensor | None,  # (R,)
        c: Tensor,  # (16, R)
        wants: AbstractSet[str],
        out: Tensor,  # (R, B), may be the tile
        tile_q: Tensor | None = None,  # (R, B)
        shape_q: Shape | None = None,
        beta: float = 0.5,
    ) -> None:
        if not self._takes(tile, out, wants):
            return self._others.grads(
                tile, target, start, shape, inverse_temperature, c, wants, out, tile_q, shape_q, beta
            )
        dense = tile_q is not None and bool(wants & OF_BOTH)
        q = (tile_q, shape_q) if dense else (None, None)
        call = _Call(tile, target, start, shape, inverse_temperature, out, *q)
        assert c.is_contiguous() and c.shape[1] == len(tile)
        costly = sum(bit for name, bit in COSTLY.items() if name in wants)
        rest = kind(wants, dense), c.data_ptr(), costly, beta, 1 - beta, call.stream
        _check(self._library.fastpost_grads(byref(call.tile), *rest))

    def _takes(self, tile: Tensor, out: Tensor | None, wants: AbstractSet[str]) -> bool:
        written = out is None or out.dtype in (torch.float32, torch.bfloat16)
        return tile.dtype == torch.float32 and written and tile.shape[1] <= self._columns and wants <= KNOWN


class _Call:
    """The arguments in C, and what they point to for as long as they do."""

    def __init__(
        self,
        tile: Tensor,
        target: Tensor,
        start: int,
        shape: Shape,
        inverse_temperature: Tensor | None,
        out: Tensor | None,
        tile_q: Tensor | None,
        shape_q: Shape | None,
    ):
        self._held: list[Tensor] = []
        self.stream = torch.cuda.current_stream(tile.device).cuda_stream if tile.is_cuda else None
        q = self._side(tile_q, shape_q) if tile_q is not None and shape_q is not None else Side(scale=1.0)
        self.tile = Tile(
            self._side(tile, shape),
            q,
            self._pointer(target, torch.int64),
            self._pointer(inverse_temperature, torch.float32),
            *tile.shape,
            start,
            self._pointer(out),
            0 if out is None else out.stride(0),
            out is not None and out.dtype == torch.bfloat16,
        )

    def _side(self, raw: Tensor, shape: Shape) -> Side:
        assert raw.dtype == torch.float32 and raw.stride(1) == 1
        bias = self._pointer(None if shape.bias is None else shape.bias.contiguous(), torch.float32)
        return Side(self._pointer(raw), raw.stride(0), bias, shape.scale, shape.softcap or 0.0)

    def _pointer(self, x: Tensor | None, dtype: torch.dtype | None = None) -> int | None:
        if x is None:
            return None
        self._held.append(x if dtype is None else x.to(dtype))
        return self._held[-1].data_ptr()


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"a launch failed with cudaError {code}")


def candidates(device: torch.device, others: TorchRows) -> dict[str, CudaRows]:
    """The twin with each size of a block, by name; none where it cannot be compiled."""
    sizes = () if missing(device) else THREADS
    return {f"{TWIN}, {threads} threads": CudaRows(partial(build, threads, device), others) for threads in sizes}
