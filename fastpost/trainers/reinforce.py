"""REINFORCE++ (arXiv:2501.03262): the policy gradient without a critic, its advantages whitened over the whole step.

  reinforce_plus_plus           A_t = sum_{i >= t} gamma^(i - t) r_i, whitened; r is the score on the last token of a
                                completion, less kl_coef KL on every one
  reinforce_plus_plus_baseline  A = R less the mean of its group, whitened; of several completions a prompt
  reinforce                     A_t = sum_{i >= t} gamma^(i - t) r_i, as it is

The ratio to the policy that sampled is clipped as in PPO, and the loss is the mean over the tokens of the step.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from fastpost import advantages
from fastpost.packing import Packed
from fastpost.packing.subsets import with_known
from fastpost.trainers.config import Reinforce
from fastpost.trainers.episodes import episodes, packs_of
from fastpost.trainers.given import GivenRewards
from fastpost.trainers.objectives import of_reinforce
from fastpost.trainers.options import check_config
from fastpost.trainers.policy import learn, look, next_rollouts, scored
from fastpost.trainers.rollouts import Rollouts, shaped_rewards
from fastpost.trainers.stage import Stage


def reinforce(config: Reinforce, **given: Unpack[GivenRewards]) -> Any:
    """Trains config.model on the prompts of config.dataset and leaves the result in config.output_dir."""
    check_config(config, Reinforce)
    stage, objective = Stage.of("reinforce", config, given, refers=config.kl_coef > 0), of_reinforce(config)
    with stage.run() as run:
        for _ in run.steps():
            rollouts = next_rollouts(run, stage)
            whole = episodes(rollouts, config)
            if stage.reference is not None:
                with run.clock.part("reference"):
                    whole = scored(whole, stage, run.world)
            whole = with_known(whole, advantage=advantages_of(rollouts, whole, config))
            learn(run, stage, objective, packs_of(whole, objective, stage, rollouts, run.world), whole, rollouts)
            look(run, stage, rollouts)
    return run.finish()


def advantages_of(rollouts: Rollouts, whole: Packed, config: Reinforce) -> Tensor:  # (T,)
    score, batch = shaped_rewards(rollouts, config), whole.batch
    old, ref = batch.old_logp, batch.ref_logp
    if old is None or ref is None:
        old = ref = torch.zeros(whole.num_tokens)
    if config.advantage == "reinforce_plus_plus_baseline":
        spent = batch.per_sequence(torch.where(batch.target != -100, old - ref, 0.0))
        penalised = score - config.kl_coef * spent
        return batch.spread(advantages.reinforce_plus_plus_baseline(penalised, config.num_generations))
    rewards = advantages.kl_in_reward(score, old, ref, batch, config.kl_coef, config.kl_estimator)
    if config.advantage == "reinforce":
        return advantages.reward_to_go(rewards, batch, config.gamma)
    return advantages.reinforce_plus_plus(rewards, batch, config.gamma)
