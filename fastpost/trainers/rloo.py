"""RLOO (arXiv:2402.14740): a completion is one action, and its baseline the mean reward of the others of its group.

  A_i = R_i - mean_{j != i} R_j,   R = reward - beta sum_t (log p_old - log p_ref)

The KL is in the reward, of the policy that sampled, so with beta above 0 a round has a pass of the policy and one of
the reference before its updates. With beta 0 the first update finds old_logp itself, as in GRPO.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from fastpost import advantages
from fastpost.packing import Packed
from fastpost.packing.subsets import with_known
from fastpost.trainers.config import Rloo
from fastpost.trainers.episodes import counts, episodes, packs_of
from fastpost.trainers.given import GivenRewards
from fastpost.trainers.objectives import of_rloo
from fastpost.trainers.options import check_config
from fastpost.trainers.policy import learn, look, next_rollouts, scored
from fastpost.trainers.rollouts import Rollouts, shaped_rewards
from fastpost.trainers.stage import Stage


def rloo(config: Rloo, **given: Unpack[GivenRewards]) -> Any:
    """Trains config.model on the prompts of config.dataset and leaves the result in config.output_dir."""
    check_config(config, Rloo)
    stage, objective = Stage.of("rloo", config, given, refers=config.beta > 0), of_rloo(config)
    with stage.run() as run:
        for _ in run.steps():
            rollouts = next_rollouts(run, stage)
            whole = episodes(rollouts, config)
            if stage.reference is not None:
                with run.clock.part("reference"):
                    whole = scored(whole, stage, run.world)
            whole = with_known(whole, advantage=whole.batch.spread(advantages_of(rollouts, whole, config)))
            learn(run, stage, objective, packs_of(whole, objective, stage, rollouts, run.world), whole, rollouts)
            look(run, stage, rollouts)
    return run.finish()


def advantages_of(rollouts: Rollouts, whole: Packed, config: Rloo) -> Tensor:  # (S,)
    rewards, batch = shaped_rewards(rollouts, config), whole.batch
    if config.reward_clip_range is not None:
        rewards = rewards.clamp(*config.reward_clip_range)
    if config.beta:
        spent = torch.where(batch.target != -100, batch.old_logp - batch.ref_logp, 0.0)
        rewards = rewards - config.beta * batch.per_sequence(spent)
    found = advantages.leave_one_out(rewards, config.num_generations)
    if config.normalize_advantages:
        found = (found - found.mean()) / (found.std() + 1e-4)
    return torch.where(counts(whole) > 0, found, 0.0)
