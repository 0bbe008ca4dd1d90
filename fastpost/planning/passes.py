"""The passes of a run over a model's trunk, acted out on fake tensors, each as a `Timeline`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastpost.models.heads import head_of
from fastpost.models.memory import SMALL
from fastpost.planning.head import ActedHead, Schedule
from fastpost.planning.outline import Outline
from fastpost.planning.timeline import Timeline, recording

CACHED = 16  # tokens of a probe of the cache


def training_pass(
    made: Outline, rows: int, length: int, *, schedule: Schedule, accumulates: bool = False, scalar: bool = False
) -> Timeline:
    """Forward and backward over a pack of `rows` sequences. accumulates: gradients of another pack are there already;
    scalar: the head gives a number a token."""
    with made.mode:
        for parameter in made.trained():
            parameter.grad = torch.empty_like(parameter) if accumulates else None
        with recording(made.model) as recorder:
            with made.autocast():
                with _offloading(made.config.activation_offloading):
                    hidden = _hidden(made, rows, length)
                loss: Any = ActedHead.apply(hidden, None if scalar else _trained_head(made), recorder, schedule)
            del hidden
            loss.backward()
        for parameter in made.trained():
            parameter.grad = None
    return recorder.timeline


def forward_pass(made: Outline, rows: int, length: int) -> Timeline:
    """Without a gradient: a reference, a reward model, a prompt that is read before it is answered."""
    made.model.eval()
    with made.mode, torch.no_grad(), recording(made.model) as recorder, made.autocast():
        hidden = _hidden(made, rows, length)
        hidden.new_empty(())
        recorder.head_at_work()
    made.model.train()
    return recorder.timeline


def cached_bytes(made: Outline) -> int:
    """What generation keeps of each token, by the model's own cache."""
    made.model.eval()
    with made.mode, torch.no_grad(), made.autocast():
        ids = torch.empty(1, CACHED, dtype=torch.int64)
        cache = made.lm.get_decoder()(input_ids=ids, use_cache=True).past_key_values
        layers = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        found = sum(x.numel() * x.itemsize for x in layers) // CACHED
    made.model.train()
    return found


def _trained_head(made: Outline) -> Tensor | None:  # (V, D)
    weight = head_of(made.model).weight
    return weight if isinstance(weight, Tensor) and weight.requires_grad else None


def _hidden(made: Outline, rows: int, length: int) -> Tensor:  # (1, T, D)
    T = rows * length
    ids, positions = torch.empty(1, T, dtype=torch.int64), torch.empty(1, T, dtype=torch.int64)
    apart: dict[str, Any] = {}
    if "fastpost" in made.lm.config._attn_implementation:  # a layout, in the place of a mask
        apart = {"attention_mask": torch.empty(1, 1, 1, rows + 1, dtype=torch.int32), "max_length_q": length}
    decoder = made.lm.get_decoder()
    try:
        return decoder(input_ids=ids, position_ids=positions, use_cache=False, **apart).last_hidden_state
    except RuntimeError as error:
        name = type(made.lm).__name__
        raise ValueError(f"{name} cannot be planned: a layer of it does not run without numbers: {error}") from error


def _offloading(wanted: bool) -> AbstractContextManager:
    """What autograd keeps is away, but for what is small: as `models.memory.offload_activations` has it."""
    return saved_tensors_hooks(_away, _back) if wanted else nullcontext()


def _away(x: Tensor) -> Tensor | tuple[torch.Size, torch.dtype]:
    weight = x if x._base is None else x._base
    small = x.numel() * x.itemsize < SMALL
    return x if small or isinstance(weight, nn.Parameter) else (x.shape, x.dtype)


def _back(kept: Tensor | tuple[torch.Size, torch.dtype]) -> Tensor:
    return kept if isinstance(kept, Tensor) else torch.empty(kept[0], dtype=kept[1])
