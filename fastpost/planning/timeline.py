"""Live bytes over a pass that is only acted out: on fake tensors, which have shapes and lifetimes and no memory.

A `Recorder` sees every storage come and go, so that whatever a model and autograd hold is counted, of any family.
After the i-th allocation

  live_i(T) = a_i + b_i T

in a pack of T tokens, where attention holds nothing of (T, T): so two passes, over T and 2 T, tell of every other T.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Timeline:
    """Bytes after each allocation of a pass, beyond what there was before it."""

    live: list[int]
    gradients: list[int]  # of them, what lies in the `grad` of parameters
    head: list[int]  # the moments at which the head is at work

    def coarse(self) -> Timeline:
        """The most before the head, at it, and after it; where two passes allocate differently often."""
        first, last = (self.head[0], self.head[-1]) if self.head else (len(self.live) - 1, len(self.live) - 1)
        spans = (range(first + 1), range(first, last + 1), range(last, len(self.live)))
        most = [max(span, key=lambda i: self.live[i]) for span in spans]
        return Timeline([self.live[i] for i in most], [self.gradients[i] for i in most], [1] if self.head else [])


@dataclass(frozen=True)
class Instant:
    """Where a pass holds the most."""

    live: int  # bytes
    gradients: int  # of them
    head: int  # bytes of the head's workspace, which come to them


@dataclass(frozen=True, eq=False)
class Growth:
    """A pass over T tokens and, as soon as another number is asked for, over 2 T."""

    tokens: int  # T
    trace: Callable[[int], Timeline]  # of a pass over so many times T

    @functools.cached_property
    def once(self) -> Timeline:
        return self.trace(1)

    @functools.cached_property
    def _pair(self) -> tuple[Timeline, Timeline]:
        """Of the same instants."""
        once, twice = self.once, self.trace(2)
        alike = len(once.live) == len(twice.live) and once.head == twice.head
        return (once, twice) if alike else (once.coarse(), twice.coarse())

    def most(self, tokens: int, workspace: int = 0) -> Instant:
        """The greediest instant of a pass over so many tokens, with so many bytes of workspace in the head."""
        once, twice = (self.once, self.once) if tokens == self.tokens else self._pair
        first, second = (torch.tensor(each.live, dtype=torch.float64) for each in (once, twice))
        live = first + (tokens / self.tokens - 1) * (second - first)
        work = torch.zeros_like(live)
        work[once.head] = workspace
        i = int((live + work).argmax())
        return Instant(round(float(live[i])), once.gradients[i], int(work[i]))


class Recorder(TorchDispatchMode):
    """Notes what is live after each allocation made inside."""

    def __init__(self, known: set[int], held: int):
        super().__init__()
        self.known = known  # storages that are counted, or were there before
        self.live = self.gradients = held
        self.timeline = Timeline([], [], [])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._see(x)
        return out

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes()).atexit = False
        self.live += storage.nbytes()
        self.timeline.live.append(self.live)
        self.timeline.gradients.append(self.gradients)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def head_at_work(self) -> None:
        """Marks the last allocation as one that the head's workspace stands beside."""
        self.timeline.head.append(len(self.timeline.live) - 1)

    def is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()


@contextmanager
def recording(module: nn.Module) -> Iterator[Recorder]:
    """A recorder of what is allocated inside. What the module holds is there already; what lies in the `grad` of its
    parameters, too, but it is counted as a gradient."""
    parameters = list(module.parameters())
    held = [p.grad.untyped_storage() for p in parameters if p.grad is not None]
    there = [x.untyped_storage() for x in (*parameters, *module.buffers())]
    recorder = Recorder({storage._cdata for storage in (*held, *there)}, sum(storage.nbytes() for storage in held))
    fresh = [p for p in parameters if p.requires_grad and p.grad is None]
    hooks = [p.register_post_accumulate_grad_hook(recorder.is_gradient) for p in fresh]
    was_enabled = gc.isenabled()
    gc.disable()  # what it frees, and when, is not the model's doing
    try:
        with recorder:
            yield recorder
    finally:
        if was_enabled:
            gc.enable()
        for hook in hooks:
            hook.remove()
