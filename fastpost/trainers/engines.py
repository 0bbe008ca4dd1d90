"""What joins the models of several processes: torch's DDP, which averages gradients, and FSDP2, which shards weights,
too (arXiv:2304.11277); DeepSpeed's ZeRO, which comes with the optimizer, is `fastpost.trainers.zero`. `accelerate
launch` says by the environment which of them, and how; under `torchrun` it is DDP.

All work by hooks around a module's forward, and a step of ours is more than a model's forward: the head's weight is
read beside the layers, and the loss is made with it. So what they wrap is a `Door`, and all of a pass goes through it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastpost.models.sharded import copied, fsdp_modules, is_sharded
from fastpost.trainers import zero, zero3

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # of a process that waits for one whose completions are long

# What accelerate can be told that does not pass through, by its variables: (variable, value) -> what would be right.
REFUSED = {
    ("ACCELERATE_USE_MEGATRON_LM", "true"): "Megatron-LM is not supported: shard by FSDP2 (distributed_type: FSDP)",
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"): "processes share the data alone: leave out parallelism_config",
    ("ACCELERATE_MIXED_PRECISION", "fp16"): "mixed_precision fp16 is not supported: choose bf16 or no",
    ("ACCELERATE_MIXED_PRECISION", "fp8"): "mixed_precision fp8 is not supported: choose bf16 or no",
}


class Door(nn.Module):
    """Its forward is whatever is done with the modules inside. The work comes as a function, whose tensors no engine
    looks into."""

    def __init__(self, inside: Sequence[nn.Module]):
        super().__init__()
        self.inside = nn.ModuleList(inside)
        self.frees = True  # whether a sharded layer is freed after its forward, and gathered again for its backward

    def forward(self, work: Callable[[], T]) -> T:
        return work()


def shards() -> bool:
    """Whether weights are to be sharded."""
    return _by_fsdp() or zero.stage() == 3


def _by_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def join() -> None:
    """Joins the processes that a launcher started; ValueError for what it was told and is not to be had."""
    for (name, value), remedy in REFUSED.items():
        if os.environ.get(name, "").lower() == value:
            raise ValueError(remedy)
    zero.check()
    if _by_fsdp() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP of version 1 is not supported: choose fsdp_version 2")
    if _by_fsdp() and os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true":
        raise ValueError("fsdp_activation_checkpointing must be off: gradient_checkpointing of the run does the same")
    # transformers would leave the weights out everywhere but in the first process
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


# ---- wrapping ----


def wrapped(door: Door) -> Any:
    """The door that passes go through; None: the processes need none, or it comes with the optimizer."""
    if _by_fsdp():
        return sharded(door)
    trains = any(p.requires_grad for p in door.parameters())
    if zero.stage():
        return zero.frozen(door) if shards() and not trains else None
    return averaged(door) if trains else None


def averaged(door: Door) -> DistributedDataParallel:
    """Gradients are means over the processes."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else None
    return DistributedDataParallel(door, devices, gradient_as_bucket_view=True)


def sharded(door: Door) -> Door:
    """The same module, of whose parameters each process has a part. Those of a layer are gathered while it works, those
    outside of layers, the head's among them, from the forward pass to the end of the backward pass."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard

    told = FullyShardedDataParallelPlugin(fsdp_version=2)
    bf16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy(),
        "offload_policy": told.cpu_offload or OffloadPolicy(),
        "ignored_params": {p for p in door.parameters() if not p.is_floating_point()},  # quantised
    }
    door.frees = bool(told.reshard_after_forward)
    for layer in _layers(door, told.transformer_cls_names_to_wrap):
        fully_shard(layer, reshard_after_forward=door.frees, **options)
    fully_shard(door, **options)
    with torch.no_grad():
        door(lambda: None)  # the first module that runs becomes the root: generation calls inner ones
    reshard(door)
    return door


def _layers(door: Door, names: Sequence[str] | None) -> list[nn.Module]:
    """The modules that are gathered one at a time: of these classes, or as the model's family knows them."""
    known = {name for module in door.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in door.modules() if type(module).__name__ in (names or known)]


def through(door: Any, work: Callable[[], T]) -> T:
    """What a pass through the door gives."""
    return door(work) if isinstance(door, Door | DistributedDataParallel) else zero.through(door, work)


def apart(door: Any) -> AbstractContextManager[None]:
    """Inside, gradients stay where they are: more are to come before those of all processes are averaged."""
    if isinstance(door, DistributedDataParallel):
        return door.no_sync()
    if isinstance(door, Door):
        return _unreduced(door)
    return nullcontext() if door is None else zero.apart(door)


@contextmanager
def _unreduced(door: Door) -> Iterator[None]:
    roots = fsdp_modules(door)[:1]
    for root in roots:
        root.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        for root in roots:
            root.set_requires_gradient_sync(True)


# ---- whole again ----


def in_parts(door: Any) -> bool:
    """Whether a process has but a part of the weights behind this door."""
    return isinstance(door, Door) or (door is not None and zero.stage() == 3)


def reshard(door: Any) -> None:
    """Frees what a pass without a backward pass left gathered."""
    if not isinstance(door, Door):
        zero3.release(door)
    for module in fsdp_modules(door):
        module.reshard()


def gathered(door: Any) -> AbstractContextManager[None]:
    """Every parameter whole in every process, so that each may run the model as often as it likes: a generation that
    ends early waits for nobody. Wants the room for the whole model."""
    return _unsharded(door) if isinstance(door, Door) else zero3.gathered(door)


@contextmanager
def _unsharded(door: Door) -> Iterator[None]:
    modules = fsdp_modules(door)
    if modules and not hasattr(modules[0], "reset_iter_state"):
        raise ValueError(f"sampling from a sharded model needs torch 2.13 or newer, got {torch.__version__}")
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(door.frees and module is not door, recurse=False)
        if modules:
            modules[0].reset_iter_state()  # of forward passes whose number was its own; reshards as well


@contextmanager
def on_host(door: Any, first: bool) -> Iterator[None]:
    """In the first process every parameter whole, on the host, one after another: what writes models sees plain ones.
    In the others nothing that could be used."""
    reshard(door)
    places = [(m, name, p) for m in door.modules() for name, p in m._parameters.items() if p is not None]
    places = [(module, name, p) for module, name, p in places if is_sharded(p) or zero3.is_part(p)]
    whole: dict[int, nn.Parameter] = {}  # by identity: tied ones stay tied
    try:
        for module, name, p in places:
            if id(p) not in whole:
                found = zero3.copied(p, first) if zero3.is_part(p) else copied(p, first)
                whole[id(p)] = nn.Parameter(found, p.requires_grad)
            module._parameters[name] = whole[id(p)]
        yield
    finally:
        for module, name, p in places:
            module._parameters[name] = p
