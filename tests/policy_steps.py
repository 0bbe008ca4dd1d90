"""The second half of a step of GRPO, from rollouts and advantages that a test makes up."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from fastpost.packing.subsets import with_known
from fastpost.shared_prompt import AnyPack
from fastpost.trainers import policy
from fastpost.trainers.config import Grpo
from fastpost.trainers.episodes import episodes, packs_of
from fastpost.trainers.objectives import of_grpo
from fastpost.trainers.rollouts import Rollouts


def policy_packs(rollouts: Rollouts, advantages: Tensor, config: Grpo, *, shared: bool = False) -> list[AnyPack]:
    whole = episodes(rollouts, config)
    whole = with_known(whole, advantage=whole.batch.spread(advantages))
    stage: Any = SimpleNamespace(shared=shared, config=config)
    return packs_of(whole, of_grpo(config), stage, rollouts)


def backward(model: Any, packs: Sequence[AnyPack], tokens: int, config: Grpo) -> tuple[list[AnyPack], dict[str, float]]:
    return policy.backward(model, packs, of_grpo(config), tokens, config)
