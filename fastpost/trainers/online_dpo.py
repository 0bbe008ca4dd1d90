"""Online DPO (arXiv:2402.04792): pairs that the policy samples as it is now, ordered by whoever judges.

A round is one optimizer step: num_generations completions of each prompt, their rewards, and of each prompt the best
and the worst as a pair for the losses of DPO. Who judges is a reward function, a reward model, or who compares two
completions (`fastpost.trainers.comparing`). Prompts whose completions are all as good say nothing and make no pair; TRL
takes the first for the better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from fastpost import Batch, Stats, metrics
from fastpost.data import Pair
from fastpost.packing import Example
from fastpost.trainers.comparing import comparer, preferred
from fastpost.trainers.config import OnlineDpo
from fastpost.trainers.dpo import loss_of
from fastpost.trainers.given import GivenPreferences
from fastpost.trainers.loop import without_dropout
from fastpost.trainers.options import check_config
from fastpost.trainers.pairs import Objective, backward
from fastpost.trainers.policy import look, next_rollouts
from fastpost.trainers.reference import reference_of
from fastpost.trainers.rollouts import Rollouts, rollout_metrics, shaped_rewards
from fastpost.trainers.stage import Stage


def online_dpo(config: OnlineDpo, **given: Unpack[GivenPreferences]) -> Any:
    """Trains config.model on the prompts of config.dataset and leaves the result in config.output_dir."""
    check_config(config, OnlineDpo)
    objective, prefer = Objective(loss_of(config), partial(_shown, config)), comparer(config, given)
    stage = Stage.of("online-dpo", config, given)
    check_pairs(stage, config, compares=prefer is not None)
    if config.disable_dropout:
        without_dropout(stage.model)
    reference = reference_of(stage.begun, config, given).scored
    with stage.run() as run:
        objective = replace(objective, reference=run.clock.part("reference")(reference))
        for _ in run.steps():
            rollouts = next_rollouts(run, stage)
            if prefer is not None:
                rollouts = preferred(rollouts, prefer, run.world)
            pairs = pairs_of(rollouts, config)
            run.clock.spend(rollouts.seconds)
            values = backward(stage.model, pairs, objective, config, run.world) if pairs else {"loss": 0.0}
            run.update(facts_of(rollouts, values, config), rollouts.num_tokens, learns=bool(pairs))
            look(run, stage, rollouts)
    return run.finish()


def check_pairs(stage: Stage, config: OnlineDpo, compares: bool) -> None:
    """ValueError for what would fail in the middle of a run."""
    longest = max(len(prompt.input_ids) for prompt in stage.data["train"]) + config.max_completion_length
    cap = config.max_tokens_per_batch
    if cap is not None and 2 * longest > cap:
        raise ValueError(f"max_tokens_per_batch must hold the longest pair, {2 * longest} tokens, got {cap}")
    if compares and not stage.task.rewards and "eval" in stage.data:
        raise ValueError(
            "an evaluation is by reward, and who compares two answers gives none: give reward too, or no eval_dataset"
        )


# ---- which pairs ----


def pairs_of(rollouts: Rollouts, config: OnlineDpo) -> list[Pair]:
    """Of each prompt its best completion and its worst, if one is better than the other."""
    rewards, G = shaped_rewards(rollouts, config), config.num_generations
    if config.mask_truncated_completions:
        rewards = rewards.where(rollouts.finished, torch.nan)
    groups = rewards.view(-1, G)
    best = groups.nan_to_num(nan=-torch.inf).argmax(1)
    worst = groups.nan_to_num(nan=torch.inf).argmin(1)
    rows = torch.arange(len(groups))
    better = groups[rows, best] > groups[rows, worst]  # NaN, where no function applied, is not
    places = torch.stack([rows * G + best, rows * G + worst], 1)[better].tolist()
    return [Pair(_example(rollouts, chosen), _example(rollouts, rejected)) for chosen, rejected in places]


def _example(rollouts: Rollouts, i: int) -> Example:
    prompt, completion = rollouts.prompts[i].input_ids, rollouts.completions[i]
    return Example([*prompt, *completion.ids], [False] * len(prompt) + completion.mask)


# ---- what a log shows of it ----


def _shown(config: OnlineDpo, stats: Stats, batch: Batch) -> dict[str, metrics.Part]:
    return metrics.preference(stats, batch, beta=config.beta) | metrics.displacement(stats, batch)


def facts_of(rollouts: Rollouts, values: Mapping[str, float], config: OnlineDpo) -> dict[str, float]:
    """By TRL's names: objective/* but for the scores are means over the completions of pairs."""
    scores, finished = shaped_rewards(rollouts, config), rollouts.finished
    facts = {
        "objective/scores": float(scores.nanmean()),
        "objective/scores_margin": float(_margins(scores.view(-1, config.num_generations)).nanmean()),
        "val/contain_eos_token": float(finished.float().mean()),
        "beta": config.beta,
    }
    if "rewards/chosen" in values:
        paid = -(values["rewards/chosen"] + values["rewards/rejected"]) / 2
        facts |= {
            "objective/kl": -paid / config.beta,
            "objective/non_score_reward": paid,
            "objective/rlhf_reward": facts["objective/scores"] + paid,
            "objective/entropy": -(values["logps/chosen"] + values["logps/rejected"]) / 2,
        }
    return rollout_metrics(rollouts, config.num_generations) | facts | dict(values)


def _margins(groups: Tensor) -> Tensor:  # (B, G) -> (B,)
    """Of the best over the worst; NaN where no function applied."""
    most = groups.nan_to_num(nan=-torch.inf).amax(1) - groups.nan_to_num(nan=torch.inf).amin(1)
    return most.where(most.isfinite(), torch.nan)
