"""A model without its weights: every module and shape that a run would train, from a config.json, on fake tensors.

transformers makes it from the config, peft puts the adapters on it, so names and sizes are the model's own; what is
quantised is acted out (`quantised.quantise`). Nothing is read but the config, and nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpost.models.loading import DTYPES, recompute_activations
from fastpost.models.lora import with_lora
from fastpost.models.memory import tile_mlps
from fastpost.models.trunk import causal_lm, positions
from fastpost.planning.attention import register
from fastpost.planning.quantised import FourBits, quantise
from fastpost.planning.states import four_bit_bytes
from fastpost.trainers.build import adapter_of, dtype_of, widen
from fastpost.trainers.config import Training
from fastpost.trainers.loop import trainable

Kind = Literal["cpu", "cuda"]


@dataclass(frozen=True, eq=False)
class Outline:
    """A model on fake tensors, which live in `mode`, for a run on a kind of device."""

    model: Any  # PEFT-wrapped where it has adapters
    mode: FakeTensorMode
    kind: Kind
    config: Training
    keeps_casts: bool = True  # autocast keeps its copy of a trained weight until the forward pass is over

    @property
    def bf16(self) -> bool:
        """Whether forward passes are autocast to bfloat16."""
        return self.kind == "cuda" if self.config.bf16 is None else self.config.bf16

    def autocast(self) -> AbstractContextManager:
        # Fake tensors are the CPU's.
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16, cache_enabled=self.keeps_casts)

    @property
    def lm(self) -> Any:
        return causal_lm(self.model)

    @property
    def positions(self) -> int | None:
        return positions(self.model)

    def trained(self, *, words: bool = True) -> list[nn.Parameter]:
        """What a loss reaches, so that it has a gradient and moments: no vision tower, and the head if there is a loss
        of words."""
        reached = {
            *self.lm.get_decoder().parameters(),
            *(self.lm.get_output_embeddings().parameters() if words else ()),
        }
        return [p for p in trainable(self.model) if p in reached]

    def adapters(self) -> int:
        """Bytes of what may train beside a frozen base."""
        return bytes_of(trainable(self.model)) if self.config.trains_adapter else 0

    def parameters(self) -> int:
        """How many numbers the model itself has, each once, adapters left out."""
        return sum(p.numel() for p in self._base())

    @property
    def vocabulary(self) -> int:
        return self.lm.get_input_embeddings().weight.shape[0]

    def head_bytes(self) -> int:
        """Of the words that a scalar head has no use for; none where they are the embedding's, too."""
        head, embedding = self.lm.get_output_embeddings(), self.lm.get_input_embeddings()
        weight = getattr(head, "base_layer", head).weight
        return 0 if weight is embedding.weight else bytes_of([weight])

    def stored(self) -> tuple[int, int]:
        """Bytes of the model itself, and of what dequantises it."""
        fours = {id(m.weight): m.weight for m in self.lm.modules() if isinstance(m, FourBits)}
        packed, state = four_bit_bytes((w.numel() for w in fours.values()), nested=self.config.use_bnb_nested_quant)
        return packed + bytes_of(x for x in (*self._base(), *self.lm.buffers()) if id(x) not in fours), state

    def _base(self) -> Iterator[nn.Parameter]:
        frozen_base = self.config.trains_adapter
        return (p for p in self.model.parameters() if not (frozen_base and p.requires_grad))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)


def outline(config: Training, kind: Kind, architecture: Any, *, scalar: bool = False) -> Outline:
    """The model of this transformers config as a run has it; with a scalar head in the place of its own, if it is to
    judge."""
    with torch.device("meta"):
        model = _made(config, kind, architecture)
        if scalar:
            embedding = model.get_input_embeddings().weight
            model.set_output_embeddings(nn.Linear(embedding.shape[1], 1, bias=False, dtype=embedding.dtype))
        if config.load_in_4bit:
            quantise(model)
        if config.trains_adapter:
            model = with_lora(model, _lora(config))
    made = Outline(model.train(), FakeTensorMode(), kind, config)
    if config.trains_adapter and made.bf16:
        widen(trainable(model))
    if config.gradient_checkpointing:
        recompute_activations(made.lm)
    if config.tiled_mlp:
        tile_mlps(model, config.tiled_mlp)
    _fake(model, made.mode)
    return made


def _made(config: Training, kind: Kind, architecture: Any) -> Any:
    """The causal LM on the meta device, with attention that is acted out where packed attention would be."""
    from transformers import AutoModelForCausalLM

    dtype = DTYPES[dtype_of(config, kind)]
    if hasattr(architecture, "quantization_config"):
        del architecture.quantization_config  # load_in_4bit says what is planned
    try:
        model: Any = AutoModelForCausalLM.from_config(
            architecture, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # of many kinds, a family's own
        raise ValueError(f"model {config.model!r} cannot be made from its config: {error}") from error
    if model.config._attn_implementation == "sdpa" or model._supports_attention_backend:
        model.set_attn_implementation(register(kind))
    return model


def _fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """From the meta device to fake tensors of the CPU, which autocast knows; what is tied stays tied."""
    seen: dict[Tensor, Tensor] = {}

    def faked(x: Tensor) -> Tensor:
        if x not in seen:
            empty = torch.empty(x.shape, dtype=x.dtype)
            seen[x] = nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty
        return seen[x]

    with mode:
        for module in model.modules():
            for name, x in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                setattr(module, name, faked(x))


def _lora(config: Training) -> Any:
    if config.lora_r:
        return adapter_of(config)
    from peft import PeftConfig

    return PeftConfig.from_pretrained(config.model)
