"""Live bytes over a pass that is only acted out: on fake tensors, which have shapes and lifetimes and no memory.

A `Recorder` sees every storage come and go, so that whatever a model and autograd hold is counted, of any family.
Two things a fake tensor does otherwise than a plain one, and both are put right: autograd adds up the gradients of what
is used twice in place (a tied embedding: V D numbers), and products of a group run in bfloat16 alone.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpost.planning.experts import GROUPED, grouped

ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True)
class Timeline:
    """Bytes after each allocation of a pass, beyond what there was before it."""

    live: Sequence[int]
    gradients: Sequence[int]  # of them, what lies in the `grad` of parameters
    head: Sequence[int]  # the moments at which the head is at work

    def coarse(self) -> Timeline:
        """The most before the head, at it, and after it; for passes that allocate differently often."""
        first, last = (self.head[0], self.head[-1]) if self.head else (len(self.live) - 1, len(self.live) - 1)
        spans = (range(first + 1), range(first, last + 1), range(last, len(self.live)))
        most = [max(span, key=lambda i: self.live[i]) for span in spans]
        return Timeline([self.live[i] for i in most], [self.gradients[i] for i in most], [1] if self.head else [])

    def after_another(self, gradients: int) -> Timeline:
        """Where all gradients are there from the beginning, and each is added to."""
        live = [held + gradients - own for held, own in zip(self.live, self.gradients, strict=True)]
        return Timeline(live, [gradients] * len(live), self.head)

    def greediest(self, workspace: int = 0) -> Instant:
        """With so many bytes of workspace in the head."""
        work = dict.fromkeys(self.head, workspace)
        i = max(range(len(self.live)), key=lambda i: self.live[i] + work.get(i, 0))
        return Instant(self.live[i], self.gradients[i], work.get(i, 0))


@dataclass(frozen=True)
class Instant:
    """Where a pass holds the most."""

    live: int  # bytes
    gradients: int  # of them
    head: int  # bytes of the head's workspace, which come to them


@dataclass(frozen=True)
class Sum:
    """One that autograd may have made in place: whether it did is seen when the first of its terms goes, or stays."""

    storage: int
    size: int
    term: int  # the storage that it would be in


class Recorder(TorchDispatchMode):
    """Notes what is live after each allocation made inside."""

    def __init__(self, known: set[int], held: int):
        super().__init__()
        self.known = known  # storages that are counted, or were there before
        self.live = self.gradients = held
        self.open: Sum | None = None
        self.timeline = Timeline([], [], [])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = (grouped if func is GROUPED else func)(*args, **(kwargs or {}))
        in_place = func is ADD and not kwargs and _by_autograd(args, out)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.see(x, args[0] if in_place else None)
        return out

    def see(self, x: Tensor, term: Tensor | None = None) -> None:
        """A tensor that was just made; as a sum, it may lie where its term was."""
        storage = x.untyped_storage()
        if storage._cdata in self.known:
            return
        self.close()
        self.known.add(storage._cdata)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes()).atexit = False
        self.open = Sum(storage._cdata, storage.nbytes(), 0 if term is None else term.untyped_storage()._cdata)
        if term is None:
            self.close()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """What was made before, but goes inside."""
        for x in tensors:
            self.see(x)

    def close(self) -> None:
        """What was not made in place takes memory of its own."""
        if self.open is None:
            return
        self.live += self.open.size
        self.open = None
        assert isinstance(self.timeline.live, list) and isinstance(self.timeline.gradients, list)
        self.timeline.live.append(self.live)
        self.timeline.gradients.append(self.gradients)

    def _gone(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        if self.open is not None and self.open.storage == storage:
            self.open = None
            return
        self.live -= size
        if self.open is not None and self.open.term == storage:
            self.live += self.open.size
            self.open = None

    def head_at_work(self) -> None:
        """Marks the last allocation as one that the head's workspace stands beside."""
        self.close()
        assert isinstance(self.timeline.head, list)
        self.timeline.head.append(len(self.timeline.live) - 1)

    def is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()


def _by_autograd(terms: tuple[Any, ...], out: Tensor) -> bool:
    """Whether a sum is one of gradients, and would fit where its first term is. (A recomputed forward pass is in a
    backward pass, too, but wants gradients.)"""
    backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
    if not backward or not all(isinstance(term, Tensor) for term in terms):
        return False
    first = terms[0]
    return first.untyped_storage().nbytes() == out.untyped_storage().nbytes() and first.dtype == out.dtype


@contextmanager
def recording(module: nn.Module) -> Iterator[Recorder]:
    """A recorder of what is allocated inside. What the module holds is there already; what lies in the `grad` of its
    parameters, too, but it is counted as a gradient."""
    parameters = list(module.parameters())
    gradients = [p.grad.untyped_storage() for p in parameters if p.grad is not None]
    there = [x.untyped_storage() for x in (*parameters, *module.buffers())]
    known = {storage._cdata for storage in (*gradients, *there)}
    recorder = Recorder(known, sum(storage.nbytes() for storage in gradients))
    fresh = [p for p in parameters if p.requires_grad and p.grad is None]
    hooks = [p.register_post_accumulate_grad_hook(recorder.is_gradient) for p in fresh]
    was_enabled = gc.isenabled()
    gc.disable()  # what it frees, and when, is not the model's doing
    try:
        with recorder:
            yield recorder
        recorder.close()
    finally:
        if was_enabled:
            gc.enable()
        for hook in hooks:
            hook.remove()
