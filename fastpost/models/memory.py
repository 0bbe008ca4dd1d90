"""Longer sequences in the same memory: what is kept between forward and backward, moved or never made.

Both functions put another `forward` on the modules of one model, nothing on their classes; `undo` takes it off again.

  tile_mlps            An MLP has no token see another, so a slice of them goes through at a time, and through once more
                       in the backward pass (arXiv:2506.13996): 4 (T, I) intermediates become 4 (tokens, I).
  offload_activations  What gradient checkpointing keeps, a (T, D) hidden state to each layer, waits in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastpost.models.switch import Switch
from fastpost.models.trunk import causal_lm

# The layers into and out of an MLP, by the families' names for them.
MLPS = (("up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("fc1", "fc2"), ("c_fc", "c_proj"))
SMALL = 1 << 20  # bytes; what is below is not worth the trip
KEPT = "_forward_before"  # where a module keeps the forward that it had


def tile_mlps(model: nn.Module, tokens: int) -> None:
    """Every MLP of the model takes so many tokens at a time; with adapters in it or not."""
    if tokens < 1:
        raise ValueError(f"tiled_mlp must be a positive number of tokens, got {tokens}")
    found = [module for module in model.modules() if _is_mlp(module)]
    if not found:
        raise ValueError(f"tiled_mlp finds no MLP in {type(causal_lm(model)).__name__}: leave it out")
    for module in found:
        _replace_forward(module, partial(_tiled, module), tokens)


def offload_activations(model: nn.Module) -> None:
    """What the layers keep for the backward pass waits in host memory; without gradient checkpointing that is much."""
    if not torch.cuda.is_available():
        raise ValueError("activation_offloading moves activations from a GPU to its host, and here is no GPU")
    _replace_forward(causal_lm(model).get_decoder(), _offloading, SMALL)


def undo(model: nn.Module) -> None:
    """Takes off whatever this file has put on the model."""
    for module in model.modules():
        while KEPT in module.__dict__:
            before = module.__dict__.pop(KEPT)
            module.__dict__.pop("forward")
            module.__dict__.update(before)


def _replace_forward(module: nn.Module, function: Callable[..., Any], size: int) -> None:
    """function(forward, size, ...) in place of forward(...). A partial, unlike a closure, is deep-copied aright."""
    before = {name: module.__dict__.pop(name) for name in (KEPT, "forward") if name in module.__dict__}
    forward = before.get("forward", module.forward)
    module.__dict__.update({"forward": partial(function, forward, size), KEPT: before})


# ---- the MLP in slices ----


def _is_mlp(module: nn.Module) -> bool:
    """By its layers. A mixture of experts, which are parameters, is none."""
    children = dict(module.named_children())
    return any(into in children and out in children for into, out in MLPS)


def _tiled(
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    tokens: int,
    hidden: Tensor,  # (..., T, D)
) -> Tensor:  # (..., T, D)
    if hidden.shape[-2] <= tokens:
        return forward(hidden)
    tiles = hidden.split(tokens, dim=-2)
    if not torch.is_grad_enabled():
        return torch.cat([forward(tile) for tile in tiles], -2)
    noted = Switch.of(module).noted  # in the backward pass other adapters may be on
    return torch.cat([checkpoint(forward, tile, use_reentrant=False, context_fn=noted) for tile in tiles], -2)


# ---- activations on the host ----


def _offloading(forward: Callable[..., Any], least: int, *args: Any, **kwargs: Any) -> Any:
    with saved_tensors_hooks(partial(_away, least), _back):
        return forward(*args, **kwargs)


def _away(least: int, x: Tensor) -> Tensor | tuple[Tensor, torch.device]:
    """A copy on the host; weights, and what is small, stay."""
    weight = x if x._base is None else x._base
    if isinstance(weight, nn.Parameter) or x.numel() * x.itemsize < least:
        return x
    host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
    return host.copy_(x, non_blocking=True), x.device


def _back(kept: Tensor | tuple[Tensor, torch.device]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept[0].to(kept[1], non_blocking=True)
