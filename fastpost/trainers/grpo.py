"""GRPO (arXiv:2402.03300): sample a group of completions a prompt, score them, push towards the better of each group.

A round is one set of rollouts and `num_iterations` optimizer steps on it. In the first of them the policy is the one
that sampled, so old_logp is its own logp in that very pass: no other pass is spent on it. At beta 0 a completion of
advantage 0 has no gradient, so groups without variance never reach the model; they keep their place in the
denominators and in the rewards that are logged. Completions of a prompt that share a pack have it once there
(`fastpost.trainers.sharing`). Of the family the losses differ (`fastpost.trainers.objectives`); DAPO (arXiv:2503.14476)
also samples on until a step is full of groups with variance.
"""

from __future__ import annotations

import time
from typing import Any, Unpack

from torch import Tensor

from fastpost import advantages, token_stats
from fastpost.data import Prompt
from fastpost.models.heads import head_of
from fastpost.models.trunk import hidden_states
from fastpost.packing import Packed
from fastpost.packing.subsets import with_known
from fastpost.shared_prompt import AnyPack
from fastpost.trainers.checkpoint import check_output_dir
from fastpost.trainers.config import Grpo
from fastpost.trainers.episodes import columns, counts, episodes, microbatches, weighted, window_of
from fastpost.trainers.given import GivenRewards, read_data
from fastpost.trainers.loop import evaluating, seed_of
from fastpost.trainers.objectives import Objective, of_grpo
from fastpost.trainers.policy import backward, say_mismatch
from fastpost.trainers.reference import Reference
from fastpost.trainers.rollouts import (
    Rollouts,
    first_group,
    greedy_reward,
    joined,
    only_groups,
    roll_out,
    rollout_metrics,
    shaped_rewards,
)
from fastpost.trainers.run import Run
from fastpost.trainers.sharing import shares_prompts
from fastpost.trainers.start import start
from fastpost.trainers.task import Task, rewards_of, sampled_prompts
from fastpost.trainers.world import ALONE, World


def grpo(config: Grpo, **given: Unpack[GivenRewards]) -> Any:
    """Trains config.model on the prompts of config.dataset and leaves the result in config.output_dir."""
    check_output_dir(config)
    rewards = rewards_of(config, given)
    rows = read_data(config, given, "grpo")
    begun = start(config, given)
    model, G, objective = begun.model, config.num_generations, of_grpo(config)
    data = {name: sampled_prompts(name, part, begun.tokenizer, config) for name, part in rows.items()}
    task = Task.of(config, rewards, model, begun.tokenizer)
    reference = Reference.of(begun, config, given) if config.beta else None
    shared = shares_prompts(model, config)
    each, updates = config.rows_per_round // G, config.updates_per_round
    with Run("grpo", config, begun, len(data["train"]), each=each, iterations=updates) as run:
        for step in run.steps():
            rollouts = _sample(run, data["train"], task.seeded(seed_of(config.seed, step)), config)
            whole = episodes(rollouts, config)
            whole = with_known(whole, advantage=whole.batch.spread(_advantages(rollouts, config)))
            whole = _corrected(whole, model, config)
            packs = packs_of(whole, objective, config, run.world, rollouts=rollouts if shared else None)
            if reference is not None:
                packs = [reference.scored(packed, config.temperature) for packed in packs]
            facts = rollout_metrics(rollouts, G)
            for _ in range(updates):
                began = time.perf_counter()
                packs, values = backward(model, packs, objective, int(counts(whole).sum()), config, run.world)
                values |= {"step_time/update": time.perf_counter() - began}
                run.update(facts | values, rollouts.num_tokens, learns=bool(packs))
            if run.first_round:
                say_mismatch(packs)
            if run.evaluates and "eval" in data:
                run.note({"eval_reward": greedy_reward(task, data["eval"])})
            run.show(first_group(rollouts, G, run.step))
    return run.finish()


def _sample(run: Run, prompts: list[Prompt], task: Task, config: Grpo) -> Rollouts:
    """The rollouts of a round. With dynamic sampling more prompts take the place of groups without variance, as long as
    there are any and it may go on."""
    G, step = config.num_generations, run.step

    def more() -> Rollouts:
        first, rows = run.taken, run.take()
        return roll_out(task, [prompts[i] for i in rows], G, step, range(first, first + len(rows)))

    found = more()
    if not config.dynamic_sampling:
        return found
    wanted = len(found.texts) // G
    kept = only_groups(found, G, _varied(found, G))
    for _ in range(config.max_resamplings - 1):
        if len(kept.texts) >= wanted * G:
            break
        new = more()
        kept = joined([kept, only_groups(new, G, _varied(new, G))])
    return only_groups(kept, G, list(range(wanted))) if kept.texts else found


def _varied(rollouts: Rollouts, G: int) -> list[int]:
    """The groups whose rewards are not all one."""
    groups = rollouts.scores.rewards.view(-1, G)
    return (groups != groups[:, :1]).any(1).nonzero()[:, 0].tolist()


def _advantages(rollouts: Rollouts, config: Grpo) -> Tensor:  # (S,)
    G, scale = config.num_generations, config.scale_rewards
    if config.multi_objective_aggregation == "normalize_then_sum":
        each = rollouts.scores.table
        return advantages.normalize_then_sum(each, config.reward_weights or [1.0] * each.shape[1], G)
    return advantages.group_centred(shaped_rewards(rollouts, config), G, scale)


def _corrected(whole: Packed, model: Any, config: Grpo) -> Packed:
    """With the advantages weighed by token, where that is asked for: by what the sampler had wrong, by entropy."""
    mode = config.rollout_correction
    if mode == "none" and config.top_entropy_quantile == 1:
        return whole

    def said(packed: Packed) -> list[Tensor]:
        hidden, temperature = hidden_states(model, packed)[0], config.temperature
        stats = token_stats(
            hidden, head_of(model), packed.batch.target, outputs=("logp", "entropy"), temperature=temperature
        )
        return [stats.logp, stats.entropy]

    with evaluating(model):
        old_logp, entropy = columns(whole, config, said)
    batch, advantage = whole.batch, whole.batch.advantage
    if mode != "none":
        clip = config.rollout_correction_clip_max
        advantage = advantage * advantages.rollout_correction(old_logp, batch.rollout_logp, batch, mode, clip)
    if config.top_entropy_quantile < 1:
        advantage = advantages.top_entropy(advantage, entropy, batch, config.top_entropy_quantile)
    return with_known(whole, advantage=advantage)


def packs_of(
    whole: Packed, objective: Objective, config: Grpo, world: World = ALONE, *, rollouts: Rollouts | None = None
) -> list[AnyPack]:
    """The completions that can have a gradient, in weighted microbatches; given `rollouts`, of shared prompts."""
    moved = whole.batch.per_sequence((whole.batch.advantage != 0).float()) > 0
    always = bool(config.beta or config.entropy_coef)
    live = [i for i, count in enumerate(counts(whole).tolist()) if count and (always or moved[i])]
    return weighted(
        microbatches(whole, live, config, world, rollouts=rollouts), objective, window_of(whole, world=world)
    )
