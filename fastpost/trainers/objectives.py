"""Names of policy losses -> what a step descends: an equation with its knobs, and what it is averaged over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor

from fastpost import Loss, losses, metrics, weights
from fastpost.knobs import knobs_of
from fastpost.metrics import Part
from fastpost.trainers.config import Grpo, Ppo, Reinforce, Rloo
from fastpost.types import Batch, Stats, Unit
from fastpost.weights import Window

# (a microbatch, its step, how many microbatches that has) -> (U,)
Weigh = Callable[[Batch, Window, int], Tensor]


@dataclass(frozen=True)
class Objective:
    """What a step descends: sum of weight * loss."""

    loss: Loss  # bound
    weigh: Weigh

    def seen(self, stats: Stats, batch: Batch) -> dict[str, Part]:
        """Entropy, KL, and where the loss clips ratios how many of them; how far the sampler is from the policy."""
        knobs = self.loss.knobs or {}
        level = "token" if self.loss.unit == "token" else "sequence"
        clip = {name: knobs[name] for name in ("epsilon", "epsilon_high") if name in knobs}
        clip |= {"epsilon": knobs["cliprange"]} if "cliprange" in knobs else {}
        parts = metrics.policy(stats, batch, **clip, importance_sampling_level=level)
        if batch.ref_logp is not None:
            parts |= metrics.kl_budget(stats, batch)
        return parts if batch.rollout_logp is None else parts | metrics.sampler_difference(batch)


def of_grpo(config: Grpo) -> Objective:
    """By loss_type and importance_sampling_level, as TRL names them."""
    by_tokens, by_sequences = _of_step(weights.token_mean), _of_step(weights.sequence_mean)
    fixed = _of_step(partial(weights.fixed_length, max_completion_length=config.max_completion_length))
    ratios = {"token": losses.grpo, "sequence": losses.gspo}[config.importance_sampling_level]
    loss, weigh = {
        "grpo": (ratios, by_sequences),
        "dapo": (ratios, by_tokens),
        "dr_grpo": (ratios, fixed),
        "bnpo": (ratios, _of_microbatch),
        "cispo": (losses.cispo, by_tokens),
        "sapo": (losses.sapo, by_sequences),
        "gmpo": (losses.gmpo, by_sequences),
        "luspo": (losses.luspo, by_sequences),
        "vespo": (losses.vespo, _of_step(weights.token_mean_of_sums)),
    }[config.loss_type]
    return _objective(loss, weigh, asdict(config))


def of_rloo(config: Rloo) -> Objective:
    """The KL is in its reward, not in its loss."""
    return _objective(losses.rloo, _of_step(weights.sequence_mean), {**asdict(config), "beta": 0.0})


def of_reinforce(config: Reinforce) -> Objective:
    """Likewise."""
    return _objective(losses.grpo, _of_step(weights.token_mean), asdict(config))


def of_ppo(config: Ppo) -> Objective:
    """Its KL is in its reward, too."""
    return _objective(losses.ppo, _of_step(weights.token_mean), asdict(config))


def _of_step(mean: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A mean over the step, to which it is all one how that is cut."""

    def weigh(batch: Batch, window: Window, microbatches: int, unit: Unit) -> Tensor:
        return mean(batch, window=window, unit=unit)

    return weigh


def _of_microbatch(batch: Batch, window: Window, microbatches: int, unit: Unit) -> Tensor:
    return weights.microbatch_mean(batch, microbatches, unit)


def _objective(loss: Loss, weigh: Callable[..., Tensor], fields: Mapping[str, Any]) -> Objective:
    """The loss with those fields of a config that are its knobs; None is the loss's own default."""
    given = {name: fields[name] for name in knobs_of(loss) if fields.get(name) is not None}
    return Objective(loss.bind(**given), partial(weigh, unit=loss.unit))
