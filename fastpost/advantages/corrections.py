"""Factors of the advantage: which tokens count, and how much.

A policy loss is linear in A while its sign stays, so what TRL multiplies a token's loss by multiplies A here, before
the forward pass, and no loss has a knob for it. A factor of 0 leaves the token its place in the denominator.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpost.advantages import checks
from fastpost.types import Batch

Mode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@torch.no_grad()
def rollout_correction(
    old_logp: Tensor,  # (T,) under the policy in the trainer
    rollout_logp: Tensor,  # (T,) as the sampler reported it; NaN: it did not
    batch: Batch,
    mode: Mode = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
) -> Tensor:  # (T,) to be multiplied with the advantage
    """w = exp(old_logp - rollout_logp), of a token or of its whole sequence, kept within [clip_min, clip_max]: the
    importance weight of a sampler that is not quite the policy (another precision, other kernels, older weights).

    *_truncate  clamps w: truncated importance sampling, IMPALA's rho (arXiv:1802.01561)
    *_mask      makes w 0 outside: IcePop (arXiv:2510.18855)
    token_*     a factor a token: biased, of low variance
    sequence_*  the product over the sequence: unbiased, but it runs off with the length. A systematic difference of
                0.003 nats a token weighs 1000 tokens 0.05: watch `metrics.importance_ratio`.

    mode, clip_max and clip_min are TRL's vllm_importance_sampling_mode, _clip_max, _clip_min, with its defaults. A
    token whose rollout_logp is NaN counts as agreeing.
    """
    checks.per_token(batch, old_logp=old_logp, rollout_logp=rollout_logp)
    checks.one_of("mode", mode, ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"))
    low, high = (0.0 if clip_min is None else clip_min), (torch.inf if clip_max is None else clip_max)
    if not 0 <= low <= high:
        raise ValueError(f"clip_min and clip_max must be 0 <= clip_min <= clip_max, got {clip_min} and {clip_max}")
    log_weight = _difference(old_logp, rollout_logp, batch)
    if mode.startswith("sequence"):
        log_weight = batch.spread(batch.per_sequence(log_weight))
    weight = log_weight.exp()
    if mode.endswith("truncate"):
        return weight.clamp(low, high)
    return torch.where((weight >= low) & (weight <= high), weight, 0.0)


@torch.no_grad()
def off_policy_mask(
    advantage: Tensor,  # (T,)
    logp: Tensor,  # (T,) under the policy being trained
    rollout_logp: Tensor,  # (T,) under the one that sampled; NaN: not known
    batch: Batch,
    off_policy_mask_threshold: float = 0.5,
) -> Tensor:  # (T,) bool
    """False where A < 0 and the sequence's mean of rollout_logp - logp exceeds the threshold, in nats a token:
    off-policy sequence masking, DeepSeek-V3.2 (arXiv:2512.02556, equation 9).

    A bad answer that the policy would hardly give any more teaches little and upsets much. The paper gives no
    threshold; TRL, where it is None and off by default, suggests 0.5.
    """
    checks.per_token(batch, advantage=advantage, logp=logp, rollout_logp=rollout_logp)
    count = batch.per_sequence(checks.kept(batch).to(logp.dtype)).clamp(min=1)
    drift = batch.per_sequence(_difference(rollout_logp, logp, batch)) / count
    return (advantage >= 0) | batch.spread(drift <= off_policy_mask_threshold)


@torch.no_grad()
def entropy_threshold(entropy: Tensor, batch: Batch, top_entropy_quantile: float = 0.2) -> Tensor:  # (T,) -> scalar
    """The entropy that a share `top_entropy_quantile` of the kept tokens reach. Over several processes or packs gather
    the entropies first."""
    checks.per_token(batch, entropy=entropy)
    checks.within("top_entropy_quantile", top_entropy_quantile, 0, 1)
    found = entropy[checks.kept(batch)]
    if not len(found):
        return entropy.new_zeros(())
    # torch.quantile refuses more than 2^24 numbers; it too draws a line between the two nearest.
    place = (1 - top_entropy_quantile) * (len(found) - 1)
    low, rest = int(place), place - int(place)
    ascending = found.sort().values
    return torch.lerp(ascending[low], ascending[min(low + 1, len(found) - 1)], rest)


@torch.no_grad()
def top_entropy(
    advantage: Tensor,  # (T,)
    entropy: Tensor,  # (T,) nats
    batch: Batch,
    top_entropy_quantile: float = 0.2,
    threshold: Tensor | None = None,  # scalar; None: `entropy_threshold` of this batch
) -> Tensor:  # (T,)
    """A where the entropy is in the top quantile of the batch's tokens, 0 elsewhere (arXiv:2506.01939): the forks in
    the road teach, the road between them does not.

    top_entropy_quantile is TRL's, whose default of 1 keeps all; the paper takes 0.2. TRL measures the entropy in the
    pass that is being trained; here it comes from an earlier one, that of old_logp, which on policy is the same.
    """
    checks.per_token(batch, advantage=advantage, entropy=entropy)
    least = entropy_threshold(entropy, batch, top_entropy_quantile) if threshold is None else threshold
    return torch.where(entropy >= least, advantage, 0.0)


def _difference(a: Tensor, b: Tensor, batch: Batch) -> Tensor:  # (T,), (T,) -> (T,)
    """a - b at kept tokens; 0 where one of them is not known."""
    return torch.where(checks.kept(batch) & ~(a.isnan() | b.isnan()), a - b, 0.0)
