"""The roles of a run of PPO: where its policy, reference, value and reward come from, and how they are kept.

With adapters all stand on one frozen base: the reference is the base, or the adapter that the run began with. Trained
whole, each is a model of its own. A checkpoint is the policy, as any model is saved, and beside it value/.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastpost.models.adapters import is_adapter
from fastpost.models.loading import recompute_activations
from fastpost.models.roles import Copied, Roles, Shared
from fastpost.trainers.build import build
from fastpost.trainers.config import Ppo
from fastpost.trainers.given import Given
from fastpost.trainers.loop import the_device
from fastpost.trainers.stage import Stage
from fastpost.trainers.start import Parts

VALUE = "value"  # the directory beside the policy's files


@dataclass(frozen=True)
class PpoParts(Parts):
    """The parts of a run of PPO."""

    roles: Roles = field(kw_only=True)


def roles_of(stage: Stage) -> Roles:
    """The roles of a stage whose parts are of `cast`."""
    parts = stage.begun.parts
    assert isinstance(parts, PpoParts)
    return parts.roles


def cast(config: Any, given: Given, found: Path | None) -> PpoParts:
    """The roles, fresh or as a checkpoint left the two that train."""
    model, tokenizer = build(config, given, found)
    model.to(the_device())
    whole = not hasattr(model, "peft_config")
    reference = _reference(config, given, whole, found) if config.kl_coef else None
    value = _value(config, model, whole, found)
    roles = Roles.of(model, reference=reference, reward=config.reward_model, value=value, tokenizer=tokenizer)
    if config.gradient_checkpointing and roles.value.model is not roles.policy.model:
        recompute_activations(roles.value.model)
    trained = roles.trainable()
    of_value = trained.get("value", [])
    times = 1.0 if config.value_learning_rate is None else config.value_learning_rate / config.learning_rate
    parameters = [*trained["policy"], *of_value]
    faster = dict.fromkeys(of_value, times)
    beside = [roles.value.model] if roles.value.model is not roles.policy.model else []
    beside += [] if roles.value.scalar is None else [roles.value.scalar]
    return PpoParts(model, tokenizer, parameters, partial(save, roles), faster, tuple(beside), roles=roles)


def save(roles: Roles, directory: Path) -> None:
    """The policy in the directory itself, the value in one of its own."""
    roles.save_role("policy", directory)
    roles.save_role("value", directory / VALUE)


def _reference(config: Ppo, given: Given, whole: bool, found: Path | None) -> Any:
    """None: the base with all adapters off."""
    if config.ref_model is not None or config.lora_r:
        return config.ref_model
    if config.model:
        return config.model
    model = given.get("model")
    if not whole:
        raise ValueError("the reference is the adapter as it is now: save it, and give its directory as ref_model")
    return copy.deepcopy(model) if found is None else model  # what resumes is a model of its own


def _value(config: Ppo, model: Any, whole: bool, found: Path | None) -> Any:
    """What the value is made of."""
    wanted, saved = config.value_model, None if found is None else found / VALUE
    if wanted == "policy":
        return Shared("policy", head=saved)
    if saved is not None:
        return saved
    reward_fits = config.reward_model is not None and (whole or is_adapter(config.reward_model))
    if wanted == "reward" or (wanted is None and reward_fits):
        return Copied("reward")
    if wanted is not None:
        return wanted
    if not whole:
        return copy.deepcopy(model.peft_config[model.active_adapter])  # one like the policy's
    if not config.model:
        raise ValueError("value_model must be given where the policy is a model that trains whole: a directory")
    return config.model
