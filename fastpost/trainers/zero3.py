"""ZeRO of stage 3 (arXiv:1910.02054): weights in parts, too. A parameter is empty but while DeepSpeed has it gathered,
which hooks around each module's forward and backward see to: those of a layer while it works; what is read beside the
layers, the head's weight among it, as long as the `Door` through which the pass goes.

Whoever wants to have the model without that door, to sample or to write it, gathers it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.trainers.loop import the_device


def is_part(x: Tensor) -> bool:
    """Whether it is a parameter of which this process has a part."""
    return hasattr(x, "ds_id")


def full_numel(x: Tensor) -> int:
    """Of all processes' parts together."""
    return x.ds_numel if is_part(x) else x.numel()  # type: ignore[attr-defined]


def full_shape(x: Tensor) -> tuple[int, ...]:
    """Of all processes' parts together."""
    return tuple(x.ds_shape if is_part(x) else x.shape)  # type: ignore[attr-defined]


def cut(door: nn.Module, told: dict[str, Any]) -> None:
    """Leaves of each parameter a part, on the device, where the model as a whole might have no room."""
    if not all(p.is_floating_point() for p in door.parameters()):
        raise ValueError("ZeRO of stage 3 does not know quantised weights: leave out load_in_4bit, or choose FSDP2")
    from deepspeed.runtime.zero import Init  # type: ignore[import-not-found]

    Init(module=door, config_dict_or_path=told)
    for buffer in door.buffers():
        buffer.data = buffer.data.to(the_device())


def release(engine: Any) -> None:
    """Frees what the last pass left gathered."""
    _hooks(engine).partition_all_parameters()


@contextmanager
def gathered(engine: Any) -> Iterator[None]:
    """Every parameter whole in every process, which may run the model as often as it likes: no hook waits for others'
    passes."""
    from deepspeed.runtime.zero import GatheredParameters  # type: ignore[import-not-found]

    release(engine)
    hooks = _hooks(engine)
    with GatheredParameters(engine.module.parameters()):
        for hook in (*hooks.forward_hooks, *hooks.backward_hooks):
            hook.remove()
        hooks.forward_hooks, hooks.backward_hooks = [], []
        try:
            yield
        finally:
            hooks._register_deepspeed_module(hooks.module)


def copied(x: nn.Parameter, first: bool) -> Tensor:
    """All of x, on the host of the first process; in the others nothing."""
    from deepspeed.runtime.zero import GatheredParameters  # type: ignore[import-not-found]

    with GatheredParameters(x):
        return x.detach().to("cpu", copy=True) if first else x.new_empty(0)


def own_part(x: Tensor, parameter: Any) -> Tensor:
    """Of x, shaped as the whole parameter, what of this process' part is."""
    size = parameter.partition_numel()
    flat = x.flatten()[size * torch.distributed.get_rank() :][:size]
    return torch.nn.functional.pad(flat, (0, size - len(flat)))


def _hooks(engine: Any) -> Any:
    """What puts them around modules."""
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer)
