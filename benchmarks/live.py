"""Memory that tensors hold, by torch's own account: not that of libraries, nor of the interpreter; so not RSS."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch._subclasses import FakeTensor


def live_bytes() -> int:
    """Of the storages of all tensors that Python can reach, each once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and not isinstance(x, FakeTensor)]
    return sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}.values())


def most_allocated(function: Callable[[], object]) -> int:
    """The most bytes that torch's allocator had handed out during a call, beyond what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = most = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
