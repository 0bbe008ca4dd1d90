"""How a run is measured: its seconds, its peak memory, and the machine it was on.

seconds   the median of several; contestants take turns, so that a slow moment of the machine falls on all of them.
          CUDA: between events, after a write that empties the L2 cache and what is to be done before a run, if any
bandwidth bytes read and written a second by a copy that no cache holds, once a run
memory    the peak above what was allocated before, less what was returned. CUDA: of the allocator. Linux: of resident
          memory after the heap was trimmed, libraries' own scratch included. Elsewhere it is not measured
"""

from __future__ import annotations

import ctypes
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
L2_FLUSH_BYTES = 256 << 20
COPIED_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
PACKAGES = ("fastpost", "torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl")
PROCESS = Path("/proc/self")


# ---- seconds ----


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    before: Callable[[], object]
    | None = None,  # done before each run, and not timed: what it leaves in the cache stays
) -> dict[str, float]:
    """The median seconds of each, over rounds in which each is run once; one more round goes before, to warm up."""
    clock, before = _cuda_clock(device) if device.type == "cuda" else _wall_clock, before or (lambda: None)
    rounds = [{name: clock(run, before) for name, run in runs.items()} for _ in range(repeats + 1)]
    return {name: statistics.median(each[name] for each in rounds[1:]) for name in runs}


def _wall_clock(run: Callable[[], object], before: Callable[[], object]) -> float:
    before()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_clock(device: torch.device) -> Callable[[Callable[[], object], Callable[[], object]], float]:
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(run: Callable[[], object], before: Callable[[], object]) -> float:
        flush.zero_()
        before()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3

    return clock


def plain_product(hidden: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """The floor's unit: one product of the same shapes and dtype, into memory that is there already."""
    a, b = hidden.detach(), weight.detach().T
    out = a.new_empty(len(a), b.shape[1])
    return lambda: torch.mm(a, b, out=out)


def bandwidth(repeats: int, device: torch.device) -> float:
    """Bytes a second."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    (seconds,) = interleaved({"copy": lambda: target.copy_(source)}, repeats, device).values()
    return 2 * source.numel() / seconds


# ---- memory ----


def peak_bytes(
    run: Callable[[], Result], returned: Callable[[Result], Iterable[Tensor | None]], device: torch.device
) -> int | None:
    """The most a run held at once, above its inputs and what it returned. A first call keeps more: warm up before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    elif (PROCESS / "clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")  # the kernel forgets the peak it has seen
        before = _resident("VmRSS")
        result = run()
        peak = _resident("VmHWM")
    else:
        return None
    kept = sum(t.untyped_storage().nbytes() for t in returned(result) if t is not None)
    return max(0, peak - before - kept)


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", (PROCESS / "status").read_text(), re.MULTILINE)
    assert found, f"{PROCESS / 'status'} has no {field}"
    return int(found[1]) * 1024


# ---- the machine ----


@dataclass(frozen=True)
class Machine:
    device: str  # cpu or cuda
    name: str  # of the processor, or of the GPU
    threads: int
    python: str
    versions: dict[str, str]


def machine(device: torch.device) -> Machine:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    versions = {package: found for package in PACKAGES if (found := version(package))}
    return Machine(device.type, name, torch.get_num_threads(), platform.python_version(), versions)


def _cpu_name() -> str:
    listed = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", listed.read_text(), re.MULTILINE) if listed.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
