"""The CPU that stands for a GPU in tests/test_cuda_rows.py: what would be wrong on one is seen to be."""

from __future__ import annotations

import ctypes
import math
import mmap
import os

import cuda_rows
import pytest
import torch
from cuda_rows import CudaRows
from torch import Tensor

import emulation
import sanitize
from fastpost.core import rows
from fastpost.core.rows import Shape
from row_problems import BOTH, PLAIN

PROT_NONE = 0
pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="needs g++")


def everything(kernels: CudaRows, tile: Tensor, tile_q: Tensor) -> Tensor:
    """The bits of a fold that overwrites its tile."""
    tile, target = tile.clone(), torch.arange(len(tile))
    state = rows.new_state(len(tile), tile.device, tile.dtype)
    kernels.fold(state, tile, target, 0, PLAIN, None, BOTH, tile_q, PLAIN, tile)
    return torch.cat([state.flatten(), tile.flatten()])


def test_the_order_of_threads_changes_no_bit_unless_a_barrier_is_missing(emulated, tmp_path):
    tiles = torch.randn(2, 3, 1500)
    racing = emulation.build(tmp_path / "racing.so", "-DEMULATED_WITHOUT_BARRIERS")
    differ = {}
    for library in (emulated, racing):
        kernels = emulation.row_kernels(library)
        first = everything(kernels, *tiles)
        with emulation.last_thread_first(library):
            differ[library] = not torch.equal(first, everything(kernels, *tiles))
    assert differ == {emulated: False, racing: True}


SKIPPED = """
#include "cuda_runtime.h"
__global__ void some(int from) { if (threadIdx.x >= from) __syncthreads(); }
extern "C" int launch(int from) {
  cudaLaunchConfig_t config{1, 64, nullptr};
  return cudaLaunchKernelEx(&config, some, from);
}
"""


def test_a_barrier_that_a_thread_does_not_come_to_fails_the_launch(tmp_path):
    source = tmp_path / "some.cu"
    source.write_text(SKIPPED)
    launch = ctypes.CDLL(str(emulation.build(tmp_path / "some.so", sources=[source]))).launch
    assert launch(0) == 0 and launch(1) == 719
    with pytest.raises(RuntimeError, match="a launch failed with cudaError 719"):
        cuda_rows._check(launch(1))


def before_a_wall(*shape: int) -> Tensor:
    """fp32 numbers that end where a page does, behind which nothing may be read or written."""
    page, size = mmap.PAGESIZE, 4 * math.prod(shape)
    room = mmap.mmap(-1, (size // page + 2) * page)
    end = len(room) - page
    wall = ctypes.addressof(ctypes.c_char.from_buffer(room)) + end
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), page, PROT_NONE) == 0
    return torch.frombuffer(room, dtype=torch.float32, count=size // 4, offset=end - size).view(shape).normal_()


@pytest.mark.parametrize("columns", [1, 7, 64, 203])
def test_nothing_is_read_or_written_beyond_a_tile(emulated, columns):
    """In a process of its own, which would not survive it."""
    p, q, out = (before_a_wall(3, columns) for _ in range(3))
    bias, c, target = before_a_wall(columns), torch.randn(rows.COEFFICIENT_ROWS, 3), torch.zeros(3, dtype=torch.int64)
    kernels, shape = emulation.row_kernels(emulated), Shape(bias, 0.5, 5.0)
    child = os.fork()
    if not child:
        state = rows.new_state(3, p.device, p.dtype)
        kernels.fold(state, p, target, 0, shape, None, BOTH, q, shape, out)
        kernels.grads(p, target, 0, shape, None, c, BOTH, out, q, shape)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_emulated_functions_err_as_much_as_cudas_may(emulated):
    """One unit in the last place, which is at most an epsilon; 1 is 1."""
    x = torch.cat([torch.zeros(1), torch.linspace(-80, 0, 1400)])[None]
    out, state = torch.empty_like(x), rows.new_state(1, x.device, x.dtype)
    emulation.row_kernels(emulated).fold(state, x, torch.tensor([-1]), 0, PLAIN, None, frozenset(), out=out)
    assert out[0, 0] == 1
    torch.testing.assert_close(out, x.exp())
    assert (out != x.exp()).float().mean() > 0.5


def test_what_compute_sanitizer_watches_runs_here_too(emulated):
    sanitize.launch_twin(emulation.row_kernels(emulated), torch.device("cpu"))
