"""GRPO (arXiv:2402.03300): sample a group of completions a prompt, score them, push towards the better of each group.

A round is one set of rollouts and `num_iterations` optimizer steps on it. In the first of them the policy is the one
that sampled, so old_logp is its own logp in that very pass: no other pass is spent on it. At beta 0 a completion of
advantage 0 has no gradient, so groups without variance never reach the model; they keep their place in the
denominators and in the rewards that are logged. Completions of a prompt that share a pack have it once there
(`fastpost.trainers.sharing`). GSPO (arXiv:2507.18071) is the same loop with another loss.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Unpack

from fastpost.advantages import group_centred
from fastpost.data import Prompt, prompts
from fastpost.trainers.checkpoint import check_output_dir
from fastpost.trainers.config import Grpo
from fastpost.trainers.given import GivenRewards, read_data
from fastpost.trainers.log import say
from fastpost.trainers.loop import seed_of
from fastpost.trainers.policy import backward, policy_packs, predicted_tokens
from fastpost.trainers.reference import Reference
from fastpost.trainers.rollouts import first_group, greedy_reward, roll_out, rollout_metrics, task_of
from fastpost.trainers.run import Run
from fastpost.trainers.sharing import shares_prompts
from fastpost.trainers.start import start


def grpo(config: Grpo, **given: Unpack[GivenRewards]) -> Any:
    """Trains config.model on the prompts of config.dataset and leaves the result in config.output_dir."""
    check_output_dir(config)
    task = task_of(config, given)
    rows = read_data(config, given, "grpo")
    begun = start(config, given)
    model, tokenizer = begun.model, begun.tokenizer
    data = {name: _prompts(name, part, tokenizer, config) for name, part in rows.items()}
    reference = Reference.of(begun, config, given) if config.beta else None
    shared = shares_prompts(model, config)
    G, asked = config.num_generations, data["train"]
    each, iterations = config.rows_per_step // G, config.num_iterations  # prompts of a round, updates
    with Run("grpo", config, begun, len(asked), each=each, iterations=iterations) as run:
        for step in run.steps():
            sampling = replace(task.sampling, seed=seed_of(config.seed, step))
            chosen = [asked[i] for i in run.take()]
            rollouts = roll_out(model, tokenizer, chosen, replace(task, sampling=sampling), G, step)
            advantages = group_centred(rollouts.scores.rewards, G, config.scale_rewards)
            packs = policy_packs(rollouts, advantages, config, shared=shared)
            if reference is not None:
                packs = [reference.scored(packed, config.temperature) for packed in packs]
            facts, tokens = rollout_metrics(rollouts, G), predicted_tokens(rollouts, config)
            for _ in range(iterations):
                began = time.perf_counter()
                packs, values = backward(model, packs, tokens, config)
                values |= {"step_time/update": time.perf_counter() - began}
                run.update(facts | values, rollouts.num_tokens, learns=bool(packs))
            if run.evaluates and "eval" in data:
                run.note({"eval_reward": greedy_reward(model, tokenizer, data["eval"], task)})
            run.show(first_group(rollouts, G, run.step))
    return run.finish()


def _prompts(name: str, rows: Any, tokenizer: Any, config: Grpo) -> list[Prompt]:
    """The prompts of a file, none so long that a completion would not fit in a pack beside it."""
    found = prompts(rows, tokenizer, config.max_prompt_length)
    say(f"{name}: {len(found)} prompts" + (f", {len(rows) - len(found)} too long" if len(found) < len(rows) else ""))
    longest = max(len(prompt.input_ids) for prompt in found) + config.max_completion_length
    if config.max_tokens_per_batch is not None and longest > config.max_tokens_per_batch:
        raise ValueError(
            f"max_tokens_per_batch must hold the longest prompt and max_completion_length, {longest} tokens together, "
            f"got {config.max_tokens_per_batch}"
        )
    return found
