"""GRPO (arXiv:2402.03300): sample a group of completions a prompt, score them, push towards the better of each group.

A round is one set of rollouts and `num_iterations` optimizer steps on it. In the first of them the policy is the one
that sampled, so old_logp is its own logp in that very pass: no other pass is spent on it. At beta 0 a completion of
advantage 0 has no gradient, so groups without variance never reach the model; they keep their place in the
denominators and in the rewards that are logged. Completions of a prompt that share a pack have it once there
(`fastpost.trainers.sharing`). Of the family the losses differ (`fastpost.trainers.objectives`); DAPO (arXiv:2503.14476)
also samples on until a step is full of groups with variance.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from fastpost import advantages, metrics
from fastpost.packing import Packed
from fastpost.packing.subsets import with_known
from fastpost.trainers.config import Grpo
from fastpost.trainers.dense import placed
from fastpost.trainers.episodes import episodes, packs_of
from fastpost.trainers.given import GivenRewards
from fastpost.trainers.objectives import of_grpo
from fastpost.trainers.options import check_config
from fastpost.trainers.policy import learn, look, next_rollouts, said_by_policy
from fastpost.trainers.rollouts import Rollouts, joined, only_groups, shaped_rewards, varied
from fastpost.trainers.run import Run
from fastpost.trainers.stage import Stage


def grpo(config: Grpo, **given: Unpack[GivenRewards]) -> Any:
    """Trains config.model on the prompts of config.dataset and leaves the result in config.output_dir."""
    check_config(config, Grpo)
    stage, objective = Stage.of("grpo", config, given, refers=config.beta > 0), of_grpo(config)
    check_dense(stage, config)
    with stage.run() as run:
        for _ in run.steps():
            rollouts = _sample(run, stage, config)
            whole = episodes(rollouts, config)
            whole = with_known(whole, advantage=_of_tokens(rollouts, whole, config))
            whole, facts = _corrected(whole, stage, config)
            packs = packs_of(whole, objective, stage, rollouts, run.world)
            if stage.reference is not None:
                with run.clock.part("reference"):
                    packs = [stage.reference.scored(packed, config.temperature) for packed in packs]
            learn(run, stage, objective, packs, whole, rollouts, facts)
            look(run, stage, rollouts)
    return run.finish()


def check_dense(stage: Stage, config: Grpo) -> None:
    """ValueError where tokens of one completion cannot have different advantages."""
    whole = {
        "importance_sampling_level": config.importance_sampling_level == "sequence",
        "loss_type": config.loss_type in ("gmpo", "luspo", "vespo"),
        "multi_objective_aggregation": config.multi_objective_aggregation == "normalize_then_sum",
    }
    for name in (name for name, wrong in whole.items() if wrong and stage.task.dense):
        raise ValueError(
            f"{name} {getattr(config, name)!r} judges a completion as one, and reward {stage.task.dense[0].name!r} its "
            f"steps: leave out {name}, or give the reward without ':dense'"
        )


def _sample(run: Run, stage: Stage, config: Grpo) -> Rollouts:
    """The rollouts of a round. With dynamic sampling more prompts take the place of groups without variance, as long as
    there are any and it may go on."""
    G = config.num_generations
    found = next_rollouts(run, stage)
    if not config.dynamic_sampling:
        return found
    wanted = len(found.texts) // G
    kept = only_groups(found, G, _varied(found, G))
    for _ in range(config.max_resamplings - 1):
        if len(kept.texts) >= wanted * G:
            break
        new = next_rollouts(run, stage, run.each)
        kept = joined([kept, only_groups(new, G, _varied(new, G))])
    return only_groups(kept, G, list(range(min(wanted, len(kept.texts) // G)))) if kept.texts else found


def _varied(rollouts: Rollouts, G: int) -> list[int]:
    """The groups whose rewards are not all one."""
    return varied(rollouts.rewards.view(-1, G)).nonzero()[:, 0].tolist()


def _of_tokens(rollouts: Rollouts, whole: Packed, config: Grpo) -> Tensor:  # (T,)
    """What a completion earned, and where its steps are rewarded what is still to come of these."""
    found = whole.batch.spread(_advantages(rollouts, config))
    for steps in rollouts.steps.values():
        rewards, at = placed(steps, rollouts.prompts, whole)
        of_steps = (rewards, at, whole.batch, config.num_generations, config.scale_rewards)
        found = found + steps.weight * advantages.process_supervision(*of_steps)
    return found


def _advantages(rollouts: Rollouts, config: Grpo) -> Tensor:  # (S,)
    G, scale = config.num_generations, config.scale_rewards
    if config.multi_objective_aggregation == "normalize_then_sum":
        each = rollouts.scores.table
        return advantages.normalize_then_sum(each, config.reward_weights or [1.0] * each.shape[1], G)
    return advantages.group_centred(shaped_rewards(rollouts, config), G, scale)


def _corrected(whole: Packed, stage: Stage, config: Grpo) -> tuple[Packed, dict[str, float]]:
    """With the advantages weighed by token, where that is asked for: by what the sampler had wrong, by entropy. And
    what the log shows of the weights."""
    mode, quantile = config.rollout_correction, config.top_entropy_quantile
    if mode == "none" and quantile == 1:
        return whole, {}
    batch, advantage, facts = whole.batch, whole.batch.advantage, {}
    old_logp, entropy = said_by_policy(whole, stage, ("logp", "entropy"), stage.begun.world)
    if mode != "none":
        clip = config.rollout_correction_clip_max
        weight = advantages.rollout_correction(old_logp, batch.rollout_logp, batch, mode, clip)
        facts = metrics.floats(metrics.importance_ratio(batch, weight, of_sequences=mode.startswith("sequence")))
        advantage = advantage * weight
    if quantile < 1:
        advantage = advantages.top_entropy(advantage, entropy, batch, quantile)
    return with_known(whole, advantage=advantage), facts
