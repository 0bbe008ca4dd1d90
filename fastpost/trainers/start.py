"""Where a run begins: its model on its device, its optimizer, and what it knows, fresh or as a checkpoint left them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpost.models.saving import save_weights
from fastpost.trainers import zero
from fastpost.trainers.build import build
from fastpost.trainers.checkpoint import OPTIMIZER, State, find, plain, read_state
from fastpost.trainers.config import Training
from fastpost.trainers.engines import Door
from fastpost.trainers.given import Given
from fastpost.trainers.log import say
from fastpost.trainers.loop import apply_gradients, seed_step, trainable
from fastpost.trainers.optimizers import adamw, load_state_tensors
from fastpost.trainers.world import ALONE, World
from fastpost.trainers.zero import Zero

# Fields that move every learning rate, unless that is constant.
LENGTH = ("max_steps", "num_train_epochs")
# What says which tensors there are, what was learnt, and what a base rounds to: a checkpoint fits no others.
SHAPING = ("verb", "lora_r", "lora_target_modules", "lora_modules_to_save", "use_dora", "optim")
SHAPING += ("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")


@dataclass(frozen=True)
class Parts:
    """What a verb trains, and how that is written into a directory."""

    model: Any
    tokenizer: Any
    parameters: list[nn.Parameter]
    save: Callable[[Path], None]
    faster: Mapping[nn.Parameter, float] = field(default_factory=dict)  # what multiplies the learning rate of some
    beside: tuple[nn.Module, ...] = ()  # what trains and is not of the model: a scalar head

    @staticmethod
    def of(model: Any, tokenizer: Any = None) -> Parts:
        """Of a causal LM, whole or with an adapter."""
        return Parts(model, tokenizer, trainable(model), partial(save_weights, model))


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    parts: Parts
    optimizer: torch.optim.Optimizer | Zero
    state: State = field(default_factory=State)
    world: World = ALONE

    @property
    def model(self) -> Any:
        return self.parts.model

    @property
    def tokenizer(self) -> Any:
        return self.parts.tokenizer

    def descend(self, rate: float, max_norm: float) -> float:
        """One optimizer step on the gradients at hand, clipped; returns their norm before clipping."""
        if isinstance(self.optimizer, Zero):
            return self.optimizer.descend(rate)
        return apply_gradients(self.parts.parameters, self.optimizer, rate, max_norm)

    def save_model(self, directory: Path) -> None:
        """What a checkpoint, and at the end the run itself, leaves for others to load."""
        self.parts.save(directory)
        self.tokenizer.save_pretrained(directory)


# (config, given, a checkpoint to take the weights from or None) -> Parts
Build = Callable[[Training, Given, Path | None], Parts]


def policy(config: Training, given: Given, found: Path | None) -> Parts:
    """A causal LM, whole or by an adapter."""
    return Parts.of(*build(config, given, found))


def start(config: Training, given: Given | None = None, build_parts: Build = policy) -> Start:
    """Fresh, or as the checkpoint that is asked for left it."""
    from safetensors.torch import load_file

    world = World.here()
    found = find(config)
    state, then = (State(), {}) if found is None else read_state(found)
    _check_shapes(config, then, found)
    seed_step(config.seed, -1)  # adapters begin at random
    parts, world = _joined(build_parts(config, given or {}, found), world)
    parts.model.train()
    if not parts.parameters:
        raise ValueError("nothing would train: no parameter of the model has requires_grad")
    optimizer, world = _divided(adamw(parts.parameters, config, parts.faster), parts, config, world)
    if found is not None:
        load_state_tensors(optimizer, load_file(found / OPTIMIZER))
        _say_what_changed(config, then)
    world.wait()  # the first one is about to write where the others have looked
    return Start(parts, optimizer, state, world)


def _joined(parts: Parts, world: World) -> tuple[Parts, World]:
    """The parts on their device, in a world whose passes go through them."""
    modules = (parts.model, *parts.beside)
    if world.size == 1:
        return parts, world.around(*modules)
    places = {p: (m, name) for each in modules for m in each.modules() for name, p in m.named_parameters(recurse=False)}
    held = [places[p] for p in parts.parameters]
    faster = {places[p]: times for p, times in parts.faster.items()}
    world = world.around(*modules)
    found = {place: getattr(*place) for place in (*held, *faster)}
    parts = replace(parts, parameters=[found[place] for place in held])
    return replace(parts, faster={found[place]: times for place, times in faster.items()}), world


def _divided(
    optimizer: torch.optim.Optimizer, parts: Parts, config: Training, world: World
) -> tuple[torch.optim.Optimizer | Zero, World]:
    """The optimizer, of which under ZeRO each process has a part; its engine is then what passes go through."""
    if world.size == 1 or not zero.stage():
        return optimizer, world
    divided = Zero(Door((parts.model, *parts.beside)), optimizer, config)
    return divided, replace(world, door=divided.engine)


def _check_shapes(config: Training, then: dict[str, Any], found: Path | None) -> None:
    now = plain(config)
    for name in SHAPING:
        if name in then and now[name] != then[name]:
            raise ValueError(
                f"{name} is {now[name]!r} and was {then[name]!r} in {found}: a resumed run must have the same"
            )


def _say_what_changed(config: Training, then: dict[str, Any]) -> None:
    now = plain(config)
    for name, value in then.items():
        if now.get(name) != value and not (name in LENGTH and config.lr_scheduler_type == "constant"):
            say(f"resuming with another {name}: {now.get(name)!r}, in the checkpoint {value!r}")
