"""The model as it was before training, for the losses that compare: no second copy of anything where that can be."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastpost import token_stats
from fastpost.models.adapters import with_weights
from fastpost.models.loading import load_model
from fastpost.models.role import Role
from fastpost.models.switch import Switch
from fastpost.shared_prompt import AnyPack
from fastpost.trainers.build import build
from fastpost.trainers.config import Dpo, Kto, OnlineDpo, Training
from fastpost.trainers.given import Given, GivenReference
from fastpost.trainers.loop import autocast
from fastpost.trainers.start import Start
from fastpost.trainers.world import ALONE, World

P = TypeVar("P", bound=AnyPack)


@dataclass(frozen=True)
class Reference:
    """The policy without its adapter, or with the one that it began with; or a frozen copy."""

    role: Role
    config: Training
    weights: dict[str, Tensor] | None = None  # of the policy's adapter at the beginning, where that was not a fresh one
    world: World = ALONE

    @staticmethod
    def of(start: Start, config: Training, given: Given | None = None) -> Reference:
        world = start.world
        if config.lora_r:
            return Reference(_constant(start.model, None), config, world=world)
        if hasattr(start.model, "peft_config"):
            role = _constant(start.model, start.model.active_adapter)
            return Reference(role, config, _first_weights(start, config), world)
        # On resume the policy has moved on, and in pieces it cannot be copied; the reference is where the run began.
        again = start.state.step > 0 or world.shards
        model = _as_it_was(config, given or {}, world) if again else copy.deepcopy(start.model)
        return Reference.apart(model, config, world)

    @staticmethod
    def apart(model: Any, config: Training, world: World = ALONE) -> Reference:
        """A model of its own, with the adapter that it has, if any."""
        world = world.around(model.requires_grad_(False))
        return Reference.now(model, config, world)

    @staticmethod
    def now(model: Any, config: Training, world: World = ALONE) -> Reference:
        """The model as it is, even if it trains on."""
        adapter = model.active_adapter if hasattr(model, "peft_config") else None
        return Reference(_constant(model, adapter), config, world=world)

    def scored(self, packed: P, temperature: float = 1.0) -> P:
        """The pack with ref_logp."""
        return replace(packed, batch=replace(packed.batch, ref_logp=self.logp(packed, temperature)))

    @torch.no_grad()
    def logp(self, packed: AnyPack, temperature: float = 1.0) -> Tensor:  # (T,)
        """Of the pack's targets."""
        model: Any = self.role.model
        with nullcontext() if self.weights is None else with_weights(model, self.weights), autocast(self.config):
            return self.world.through(partial(self._logp, packed, temperature))

    def _logp(self, packed: AnyPack, temperature: float) -> Tensor:
        hidden, head = self.role.hidden(packed), self.role.head()
        return token_stats(hidden, head, packed.batch.target, temperature=temperature).logp


def reference_of(start: Start, config: Dpo | Kto | OnlineDpo, given: GivenReference) -> Reference:
    """The one that is given or named, or the model as it was."""
    other = given.get("ref_model")
    if other is not None:
        return Reference.apart(other, config, start.world)
    if config.ref_model is None:
        return Reference.of(start, config, given)
    other, tokenizer = load_model(
        config.ref_model,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    if tokenizer.get_vocab() != start.tokenizer.get_vocab():
        raise ValueError(f"ref_model {config.ref_model!r} has another vocabulary than the model")
    return Reference.apart(other, config, start.world)


def _constant(model: Any, adapter: str | None) -> Role:
    return Role("reference", Switch.of(model), adapter, trained=False)


def _as_it_was(config: Training, given: Given, world: World) -> Any:
    """A model that is given is as it was: what resumes is a model of its own, from the checkpoint."""
    model = given.get("model")
    if model is not None and world.shards:
        raise ValueError("the reference of a model that is given and then sharded would be lost: give model as a path")
    return build(config)[0] if model is None else model


def _first_weights(start: Start, config: Training) -> dict[str, Tensor]:
    """Those of the policy's adapter before the first step."""
    if start.world.shards:
        raise ValueError("the reference of an adapter that trains on cannot be had of sharded weights: merge it")
    from peft import get_peft_model_state_dict, load_peft_weights

    if config.model:
        return load_peft_weights(config.model, device="cpu")
    if start.state.step:
        raise ValueError("the reference is the adapter as it was, which is not there any more: save it, and give model")
    return {name: x.detach().cpu().clone() for name, x in get_peft_model_state_dict(start.model).items()}
