"""The roles of post-training on one frozen base: policy, reference, value, reward, teacher.

PPO's four models are one base and three adapters, the policy's, the value's and the reward's; with all of them off it
is the reference. The policy and the value train, nothing else does. A value may read the policy's own hidden states, of
the same pass of the trunk, or have an adapter and a pass of its own; then it can begin as the reward, as InstructGPT's
does (arXiv:2203.02155). Any role may also be a model of its own, and beside a policy that is the base itself, trained
whole, all of them are.

    roles = Roles.of(model, policy=LoraConfig(r=16), reward="reward-adapter", value=Copied("reward"))
    with torch.no_grad():
        ref_logp = linear_logprobs(roles.reference.hidden(packed), roles.reference.head(), packed.batch.target)
        scores, old_value = roles.reward.at_ends(packed), roles.value(packed)
    loss = fused_loss(losses.ppo, roles.policy.hidden(packed), roles.policy.head(), batch)
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from fastpost.models.casting import TRAINED, Copied, Shared, Source, cast
from fastpost.models.loading import load_model
from fastpost.models.named_adapters import save_adapter
from fastpost.models.probe import check_packing
from fastpost.models.qlora import keep_differentiable
from fastpost.models.role import Role
from fastpost.models.saving import written_aside
from fastpost.models.scalar import save_scalar
from fastpost.models.switch import Switch
from fastpost.models.trunk import causal_lm
from fastpost.types import nearest

__all__ = ["Copied", "Role", "Roles", "Shared"]


@dataclass(frozen=True, eq=False)
class Roles:
    """The roles there are, each by its name and as an attribute; one that there is not is a ValueError."""

    by_name: Mapping[str, Role]

    def __getitem__(self, name: str) -> Role:
        if name not in self.by_name:
            known = f"there are {', '.join(self.by_name)}{nearest(name, list(self.by_name))}"
            raise ValueError(f"there is no role {name!r}: {known}")
        return self.by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    @property
    def policy(self) -> Role:
        return self["policy"]

    @property
    def reference(self) -> Role:
        return self["reference"]

    @property
    def value(self) -> Role:
        return self["value"]

    @property
    def reward(self) -> Role:
        return self["reward"]

    @property
    def teacher(self) -> Role:
        return self["teacher"]

    def using(self, name: str) -> AbstractContextManager[None]:
        """Whatever the role's model does inside, it does in this role."""
        return self[name].using()

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """What an optimizer is to hold, by role, each tensor once."""
        seen: set[int] = set()
        found: dict[str, list[nn.Parameter]] = {}
        for name, role in self.by_name.items():
            own = [p for p in role.parameters() if id(p) not in seen]
            seen |= {id(p) for p in own}
            found |= {name: own} if own else {}
        return found

    def save(self, directory: str | PathLike[str]) -> None:
        """directory/<role> for each that trains: PEFT's files of an adapter, a model's own, or a scalar head alone.
        Each is what `Roles.of` takes for that role (`Shared("policy", head=...)` for a head alone)."""
        with written_aside(directory) as aside:
            for name in self.trainable():
                self.save_role(name, aside / name)

    def save_role(self, name: str, directory: Path) -> None:
        """One of them, into a directory that is new or empty."""
        role = self[name]
        model: Any = role.model
        if role is not self.policy and role.shares_pass(self.policy):
            assert role.scalar is not None
            save_scalar(role.scalar, directory)
        elif role.adapter is None:
            model.save_pretrained(directory)
        else:
            save_adapter(model, role.adapter, role.scalar, directory)

    @staticmethod
    def of(
        model: Any,
        *,
        policy: Source = None,
        reference: Source = None,
        value: Source = None,
        reward: Source = None,
        teacher: Source = None,
        tokenizer: Any = None,
    ) -> Roles:
        """Roles on `model`, a causal LM as `load_model` gives it, or a directory; it is changed in place.

        A role is one of
          LoraConfig(...)      a new adapter of the model, for what is trained: policy, value
          "directory"          an adapter in PEFT's files, or a model of its own
          a model              of its own, with the adapter it has, if any; a value trains where it requires a gradient
          Copied("reward")     what that role is, once more
          Shared("policy")     the policy's adapter with a scalar head beside the model's: value alone
        policy None: the model's active adapter, or without one the model itself, trained whole.
        reference None: the model with all adapters off; none where the policy is the model itself.
        The value and the reward have scalar heads: that of the files, that of the copied role, or else zeros.

        tokenizer: the policy's; None: that of the model's directory. A role's directory with another vocabulary is
        refused, one with further tokens is not.
        Raises ValueError, naming the role, for what does not fit the model, and naming the model for one that cannot be
        trained on packs.
        """
        base, own = load_model(model) if isinstance(model, str | PathLike) else (model, None)
        given = {"policy": policy, "reward": reward, "value": value, "reference": reference, "teacher": teacher}
        places = cast(base, given, own if tokenizer is None else tokenizer)
        models = {id(place.model): place.model for place in places.values()}
        for each in models.values():
            keep_differentiable(each)
            check_packing(each)
        switches = {key: Switch.of(each) for key, each in models.items()}
        roles = Roles(
            {
                name: Role(name, switches[id(place.model)], place.adapter, name in TRAINED, place.scalar)
                for name, place in places.items()
            }
        )
        _freeze(roles, causal_lm(base))
        _check(roles)
        return roles


def _freeze(roles: Roles, base: nn.Module) -> None:
    """requires_grad, for once and all: no switch will touch it."""
    for role in roles.by_name.values():
        model: Any = role.model
        if hasattr(model, "peft_config") and causal_lm(model) is base:
            for adapter in model.peft_config:
                model.set_requires_grad(adapter, any(adapter == roles[n].adapter for n in TRAINED if n in roles))
        elif not role.trained:
            model.requires_grad_(False)
        if role.scalar is not None:
            role.scalar.requires_grad_(role.trained)


def _check(roles: Roles) -> None:
    trained = roles.trainable()
    for name in TRAINED:
        if name in roles and name not in trained:
            raise ValueError(f"nothing of the {name} requires a gradient: it would not be trained")
    V = roles.policy.head().vocabulary
    for name in ("reference", "teacher"):
        if name in roles and roles[name].head().vocabulary != V:
            raise ValueError(
                f"{name} has a vocabulary of {roles[name].head().vocabulary} and the policy one of {V}: they must be "
                "the same"
            )
