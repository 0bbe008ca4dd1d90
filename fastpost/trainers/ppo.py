"""PPO (arXiv:1707.06347, arXiv:2203.02155): sample, judge, and improve policy and value on what was sampled.

A round, of num_ppo_epochs x num_mini_batches optimizer steps:

  completions of the next prompts, and their scores: of reward functions, of a reward model, or the sum of both
  old_logp, ref_logp and the old values of every token, by one pass of each role
  r_t = -kl_coef KL_t, the score on the last token, and those of steps where these end
  A_t by GAE, whitened;  return = A + V
  each minibatch: the clipped loss of the policy, vf_coef times the clipped loss of the value, one step

Roles are of `fastpost.trainers.ppo_roles`. kl_coef may be adapted to hold a target (arXiv:1909.08593, section 2.2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Unpack

import torch
from torch import Tensor

from fastpost import fused_loss, losses, metrics, token_stats
from fastpost.advantages import gae, kl_in_reward, on_tokens, whiten
from fastpost.models.roles import Roles
from fastpost.packing import Packed
from fastpost.packing.subsets import with_known
from fastpost.shared_prompt import AnyPack
from fastpost.trainers.config import Ppo
from fastpost.trainers.dense import placed
from fastpost.trainers.episodes import columns, episodes, microbatches, of_rows, weighted, window_of
from fastpost.trainers.given import GivenRewards
from fastpost.trainers.loop import autocast, bins, evaluating, seed_of, the_device
from fastpost.trainers.objectives import Objective, of_ppo
from fastpost.trainers.options import check_config
from fastpost.trainers.policy import next_rollouts, say_mismatch
from fastpost.trainers.ppo_roles import cast, roles_of
from fastpost.trainers.rollouts import Rollouts, first_group, greedy, judged, rollout_metrics, shaped_rewards
from fastpost.trainers.run import Run
from fastpost.trainers.stage import Stage
from fastpost.trainers.world import ALONE, World
from fastpost.trainers.zero import Zero
from fastpost.types import IGNORE, Batch, Stats

JUDGE = "reward_model"  # its name among the rewards
OF_REFERENCE = ("objective/kl", "objective/kl_coef", "objective/non_score_reward")


def ppo(config: Ppo, **given: Unpack[GivenRewards]) -> Any:
    """Trains config.model on the prompts of config.dataset; leaves the policy in config.output_dir, the value in
    value/ there."""
    check_config(config, Ppo)
    stage, objective = Stage.of("ppo", config, given, build_parts=cast), of_ppo(config)
    roles = roles_of(stage)
    if config.value_warmup_rounds and isinstance(stage.begun.optimizer, Zero):
        raise ValueError("value_warmup_rounds must be 0 under ZeRO, which steps all parameters at once: use DDP, FSDP2")
    with stage.run() as run:
        run.kept.setdefault("kl_coef", config.kl_coef)
        run.log.tally(run.taken * config.num_generations)
        for _ in run.steps():
            rollouts = score(next_rollouts(run, stage), roles, config, run.world)
            run.log.tally(run.taken * config.num_generations)
            with run.clock.part("reference"):
                whole = known(episodes(rollouts, config), roles, config, run.world)
            if run.first_round:
                say_mismatch([whole])
            whole, facts = advised(whole, rollouts, run.kept["kl_coef"], config)
            learn(run, whole, roles, objective, facts | rollout_metrics(rollouts, config.num_generations), rollouts)
            if config.target_kl is not None:
                run.kept["kl_coef"] = adapted(run.kept["kl_coef"], facts["objective/kl"], len(rollouts.texts), config)
            if run.evaluates and "eval" in stage.data:
                held_out = score(greedy(stage.task, stage.data["eval"]), roles, config, run.world)
                run.note({"eval_reward": float(held_out.rewards.nanmean())})
            run.show(first_group(rollouts, config.num_generations, run.step))
    return run.finish()


# ---- of a round ----


@torch.no_grad()
def score(rollouts: Rollouts, roles: Roles, config: Ppo, world: World = ALONE) -> Rollouts:
    """With the number of the reward model, at the last token of each completion, added to that of the functions."""
    if "reward" not in roles:
        return rollouts
    began, whole = time.perf_counter(), episodes(rollouts, config)
    lengths = whole.batch.lengths.tolist()
    found = torch.zeros(len(lengths))
    for rows in world.share(bins(lengths, config), lengths):
        with autocast(config):
            packed = of_rows(whole, rows).to(the_device())
            numbers = world.through(partial(roles.reward.at_ends, packed)).float().cpu()
        if rows:  # a placeholder has a number, and no row
            found[rows] = numbers
    weight = 1.0 if config.reward_weights is None else config.reward_weights[-1]
    return judged(rollouts, JUDGE, world.summed(found), weight, time.perf_counter() - began)


def known(whole: Packed, roles: Roles, config: Ppo, world: World = ALONE) -> Packed:
    """With old_logp, ref_logp and old_value of every token. Where value and policy share a pass, so here."""
    policy, value = roles.policy, roles.value

    def said(packed: Packed) -> list[Tensor]:
        target, temperature = packed.batch.target, config.temperature
        hidden = policy.hidden(packed)
        old_logp = token_stats(hidden, policy.head(), target, temperature=temperature).logp
        values = value.scores(hidden) if value.shares_pass(policy) else value(packed)
        if "reference" not in roles:
            return [old_logp, old_logp, values]
        reference = roles.reference
        ref_logp = token_stats(reference.hidden(packed), reference.head(), target, temperature=temperature).logp
        return [old_logp, ref_logp, values]

    with evaluating(policy.model), evaluating(value.model):
        old_logp, ref_logp, values = columns(whole, config, lambda packed: world.through(partial(said, packed)), world)
    return with_known(whole, old_logp=old_logp, ref_logp=ref_logp, old_value=values)


def advised(whole: Packed, rollouts: Rollouts, kl_coef: float, config: Ppo) -> tuple[Packed, dict[str, float]]:
    """With advantage and return_ of every token; and what the log shows of the rewards."""
    batch, kept, final = whole.batch, whole.batch.target != IGNORE, shaped_rewards(rollouts, config)
    rewards = kl_in_reward(final, batch.old_logp, batch.ref_logp, batch, kl_coef, config.kl_estimator)
    of_steps = torch.zeros(whole.num_tokens)
    for steps in rollouts.steps.values():
        of_steps += steps.weight * on_tokens(*placed(steps, rollouts.prompts, whole), batch)
    rewards = rewards + torch.where(kept, of_steps, 0.0)
    if config.whiten_rewards:
        rewards = whiten(rewards, kept, shift_mean=False)
    advantage, returns = gae(rewards, batch.old_value, batch, config.gamma, config.lam)
    score = final.nan_to_num(0.0) + batch.per_sequence(of_steps)
    seen = metrics.ppo_rollout(score, batch, rollouts.finished, kl_coef=kl_coef, kl_estimator=config.kl_estimator)
    facts = metrics.floats(seen) | {"objective/kl_coef": kl_coef}
    if not config.kl_coef:  # there was no reference to be far from
        facts = {name: value for name, value in facts.items() if name not in OF_REFERENCE}
    return with_known(whole, advantage=whiten(advantage, kept), return_=returns), facts


def adapted(kl_coef: float, kl: float, completions: int, config: Ppo) -> float:
    """kl_coef (1 + e n / kl_horizon), e = KL / target_kl - 1 within 0.2 of 0."""
    assert config.target_kl is not None
    error = min(0.2, max(-0.2, kl / config.target_kl - 1)) if math.isfinite(kl) else 0.0
    return kl_coef * (1 + error * completions / config.kl_horizon)


# ---- updates ----


def learn(
    run: Run, whole: Packed, roles: Roles, objective: Objective, facts: dict[str, float], rollouts: Rollouts
) -> None:
    """The optimizer steps of a round: each epoch cuts the completions into minibatches anew."""
    config: Any = run.config
    run.clock.spend(rollouts.seconds)
    S = whole.batch.lengths.numel()
    value_alone = run.step < config.value_warmup_rounds * run.iterations
    for epoch in range(config.num_ppo_epochs):
        shuffled = torch.randperm(S, generator=torch.Generator().manual_seed(seed_of(config.seed, run.step, epoch)))
        for rows in minibatches(shuffled.tolist(), config.num_mini_batches):
            packs = weighted(microbatches(whole, rows, config, run.world), objective, window_of(whole, rows, run.world))
            values = backward(packs, roles, objective, config, run.world, value_alone=value_alone)
            tokens = int(whole.batch.lengths[torch.as_tensor(rows)].sum())
            run.update(facts | values, tokens)


def minibatches(rows: Sequence[int], count: int) -> list[list[int]]:
    """`count` parts, nearly alike; where there are fewer rows, some have the first row again."""
    cuts = [i * len(rows) // count for i in range(count + 1)]
    return [list(rows[a:b]) or [rows[0]] for a, b in pairwise(cuts)]


def backward(
    packs: Sequence[AnyPack],
    roles: Roles,
    objective: Objective,
    config: Ppo,
    world: World = ALONE,
    *,
    value_alone: bool = False,
) -> dict[str, float]:
    """Adds the gradient of a minibatch, to the policy and to the value, or to that alone; means for the log.

    Where the two have passes of their own, that of the policy is over, and its memory free, when the value's begins;
    but not with several processes, whose engines want one backward pass, and a gradient of all that trains.
    """
    policy, value, seen = roles.policy, roles.value, {}
    shared = value.shares_pass(policy)
    early = not shared and not value_alone and world.size == 1
    value_last = early or (value_alone and world.size == 1)
    clip = {"cliprange": config.cliprange, "cliprange_value": config.cliprange_value}

    def both(packed: AnyPack) -> tuple[Tensor, Tensor, Stats, Tensor]:
        with autocast(config):
            hidden = policy.hidden(packed)
            loss, stats = fused_loss(
                objective.loss,
                hidden,
                policy.head(),
                packed.batch,
                temperature=config.temperature,
                outputs=("entropy",),
                return_stats=True,
            )
        if early:
            loss.backward()
        with autocast(config):
            numbers = value.scores(hidden.detach() if value_alone else hidden) if shared else value(packed)
        return loss, config.vf_coef * of_values(numbers, packed.batch, config), stats, numbers.detach()

    for packed in world.turns(packs):
        loss, of_value, stats, numbers = world.through(partial(both, packed))
        (of_value if value_last else of_value + loss * (not value_alone)).backward()
        of_step = {"loss": metrics.total((loss + of_value) / world.size)}
        seen = metrics.joined(seen, of_step, metrics.ppo_update(stats, packed.batch, numbers, **clip))
    for parameter in policy.parameters() if value_alone else ():
        parameter.grad = None  # zeros would count as a step
    return metrics.floats(metrics.over_ranks(seen))


def of_values(numbers: Tensor, batch: Batch, config: Ppo) -> Tensor:  # (T,) -> ()
    """The value's loss, with the weights of the policy's."""
    error = losses.value(numbers, batch, cliprange_value=config.cliprange_value)
    return torch.where(batch.target != IGNORE, error * batch.weight, 0.0).sum()
