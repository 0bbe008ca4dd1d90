"""The model as it was before training, for the losses that compare: no second copy of anything where that can be."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastpost import token_stats
from fastpost.models.adapters import with_weights
from fastpost.models.role import Role
from fastpost.models.switch import Switch
from fastpost.shared_prompt import AnyPack
from fastpost.trainers.build import build
from fastpost.trainers.config import Training
from fastpost.trainers.given import Given
from fastpost.trainers.loop import autocast, the_device
from fastpost.trainers.start import Start

P = TypeVar("P", bound=AnyPack)


@dataclass(frozen=True)
class Reference:
    """The policy without its adapter, or with the one that it began with; or a frozen copy."""

    role: Role
    config: Training
    weights: dict[str, Tensor] | None = None  # of the policy's adapter at the beginning, where that was not a fresh one

    @staticmethod
    def of(start: Start, config: Training, given: Given | None = None) -> Reference:
        if config.lora_r:
            return Reference(_constant(start.model, None), config)
        if hasattr(start.model, "peft_config"):
            return Reference(_constant(start.model, start.model.active_adapter), config, _first_weights(start, config))
        # On resume the policy has moved on; the reference is still where the run began.
        begun = start.state.step > 0
        model = _as_it_was(config, given or {}) if begun else copy.deepcopy(start.model)
        return Reference.apart(model, config)

    @staticmethod
    def apart(model: Any, config: Training) -> Reference:
        """A model of its own, with the adapter that it has, if any."""
        adapter = model.active_adapter if hasattr(model, "peft_config") else None
        return Reference(_constant(model.to(the_device()).requires_grad_(False), adapter), config)

    @torch.no_grad()
    def scored(self, packed: P, temperature: float = 1.0) -> P:
        """The pack with ref_logp."""
        model: Any = self.role.model
        with nullcontext() if self.weights is None else with_weights(model, self.weights), autocast(self.config):
            hidden, head = self.role.hidden(packed), self.role.head()
            stats = token_stats(hidden, head, packed.batch.target, temperature=temperature)
        return replace(packed, batch=replace(packed.batch, ref_logp=stats.logp))


def _constant(model: Any, adapter: str | None) -> Role:
    return Role("reference", Switch.of(model), adapter, trained=False)


def _as_it_was(config: Training, given: Given) -> Any:
    """A model that is given is as it was: what resumes is a model of its own, from the checkpoint."""
    model = given.get("model")
    return build(config)[0] if model is None else model


def _first_weights(start: Start, config: Training) -> dict[str, Tensor]:
    """Those of the policy's adapter before the first step."""
    from peft import get_peft_model_state_dict, load_peft_weights

    if config.model:
        return load_peft_weights(config.model, device="cpu")
    if start.state.step:
        raise ValueError("the reference is the adapter as it was, which is not there any more: save it, and give model")
    return {name: x.detach().cpu().clone() for name, x in get_peft_model_state_dict(start.model).items()}
