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
from fastpost.planning.outline import Outline, bytes_of
from fastpost.planning.timeline import Timeline, recording
from fastpost.rollout.keyed import inverse_cdf


def training_pass(made: Outline, rows: int, length: int, *, schedule: Schedule, scalar: bool = False) -> Timeline:
    """Forward and backward over a pack of `rows` sequences, the first of a step. scalar: the head gives a number a
    token."""
    with made.mode:
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
    """Without a gradient: a reference, a value, a reward model."""
    made.model.eval()
    with made.mode, torch.no_grad(), recording(made.model) as recorder, made.autocast():
        hidden = _hidden(made, rows, length)
        hidden.new_empty(())
        recorder.head_at_work()
    made.model.train()
    return recorder.timeline


# What transformers' `generate` does.


def prompt_pass(made: Outline, completions: int, length: int) -> Timeline:
    """Prompts are read, and their keys and values kept."""
    made.model.eval()
    with made.mode, torch.no_grad(), recording(made.model) as recorder, made.autocast():
        _generating(made, completions, length, _empty_cache(made))
    made.model.train()
    return recorder.timeline


def decoding_pass(made: Outline, cache: Any) -> Timeline:
    """One token after those of the cache: the keys and values of a layer are copied as they grow, a token is drawn."""
    made.model.eval()
    with made.mode, torch.no_grad(), recording(made.model) as recorder, made.autocast():
        recorder.hold(_tensors(cache))
        completions = cache.layers[0].keys.shape[0]
        logits = made.lm.get_output_embeddings()(_generating(made, completions, 1, cache))
        inverse_cdf(logits[:, -1].float(), torch.empty(completions, dtype=torch.float64))
    made.model.train()
    return recorder.timeline


def token_cache(made: Outline) -> Any:
    """The model's own cache, of one token."""
    made.model.eval()
    with made.mode, torch.no_grad(), recording(made.model), made.autocast():
        cache = _empty_cache(made)
        _generating(made, 1, 1, cache)
    made.model.train()
    return cache


def grown(made: Outline, token: Any, completions: int, length: int) -> Any:
    """Such a cache of so many tokens. Of a window it keeps no more than that."""
    cache = _empty_cache(made)
    with made.mode, torch.no_grad():
        for i, layer in enumerate(token.layers):
            keys, values = (
                x.new_empty(completions, x.shape[1], length, x.shape[3]) for x in (layer.keys, layer.values)
            )
            cache.update(keys, values, i)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()  # of a window, not of all before it
    return cache


def cache_bytes(cache: Any) -> int:
    return bytes_of(_tensors(cache))


def _tensors(cache: Any) -> list[Tensor]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def _empty_cache(made: Outline) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=made.lm.config.get_text_config(decoder=True))


def _generating(made: Outline, rows: int, length: int, cache: Any) -> Tensor:  # (n, L, D)
    ids, positions = (torch.empty(rows, length, dtype=torch.int64) for _ in range(2))
    return _run(made, input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)


# Packs.


def _trained_head(made: Outline) -> Tensor | None:  # (V, D)
    weight = head_of(made.model).weight
    return weight if isinstance(weight, Tensor) and weight.requires_grad else None


def _hidden(made: Outline, rows: int, length: int) -> Tensor:  # (1, T, D)
    ids, positions = (torch.empty(1, rows * length, dtype=torch.int64) for _ in range(2))
    apart: dict[str, Any] = {}
    if "fastpost" in made.lm.config._attn_implementation:  # a layout, in the place of a mask
        apart = {"attention_mask": torch.empty(1, 1, 1, rows + 1, dtype=torch.int32), "max_length_q": length}
    return _run(made, input_ids=ids, position_ids=positions, use_cache=False, **apart)


def _run(made: Outline, **inputs: Any) -> Tensor:  # (n, L, D)
    try:
        return made.lm.get_decoder()(**inputs).last_hidden_state
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
