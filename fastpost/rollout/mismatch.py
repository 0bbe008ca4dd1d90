"""How far the sampler's log-probabilities are from the trainer's, of the same tokens under the same weights.

  difference  |log p_trainer - log p_sampler|
  ratio       p_trainer / p_sampler, the importance weight of a token

Two programs that compute one policy in bf16 differ by 0.01 to 0.05 nats a token, and hardly on average (trl#6789). What
is far beyond that is not rounding: the sampler has other weights, or another temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGE = 0.1  # nats a token on average: twice what rounding to bf16 has been seen to do


@dataclass(frozen=True)
class Mismatch:
    """Over the tokens of which the sampler gave its log-probability."""

    tokens: int
    difference_mean: float
    difference_max: float
    ratio_min: float
    ratio_mean: float
    ratio_max: float

    @property
    def metrics(self) -> dict[str, float]:
        """By TRL's names."""
        difference, ratio = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
        return {
            f"{difference}/mean": self.difference_mean,
            f"{difference}/max": self.difference_max,
            f"{ratio}/min": self.ratio_min,
            f"{ratio}/mean": self.ratio_mean,
            f"{ratio}/max": self.ratio_max,
        }

    @property
    def sentence(self) -> str:
        """For a person, with advice where it is needed."""
        if not self.tokens:
            return "the sampler gave no log-probabilities to compare with the trainer's"
        mean, most = f"{self.difference_mean:.0e}", f"{self.difference_max:.0e}"
        said = f"the sampler's log-probabilities differ from the trainer's by {mean} on average, at most {most}"
        if self.difference_mean <= LARGE:
            return said
        return (
            f"{said}: this is more than rounding. Look whether the sampler has the weights of this step, whether "
            "dropout is on in the trainer, and whether both have one temperature"
        )


def mismatch(
    sampler: Tensor,  # (T,) log-probabilities as the sampler gave them; NaN: it did not
    trainer: Tensor,  # (T,) of the same tokens
) -> Mismatch:
    if sampler.shape != trainer.shape:
        raise ValueError(f"sampler and trainer must have one shape, got {tuple(sampler.shape)}, {tuple(trainer.shape)}")
    apart = (trainer.double() - sampler.double())[~sampler.isnan()]
    if not apart.numel():
        return Mismatch(0, *[torch.nan] * 5)
    difference, ratio = apart.abs(), apart.exp()
    found = [difference.mean(), difference.max(), ratio.min(), ratio.mean(), ratio.max()]
    return Mismatch(apart.numel(), *torch.stack(found).tolist())
