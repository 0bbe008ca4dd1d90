"""GRPO (arXiv:2402.03300): sample a group of completions a prompt, score them, push towards the better of each group.

A round is one set of rollouts and `num_iterations` optimizer steps on it. In the first of them the policy is the one
that sampled, so old_logp is its own logp in that very pass: no other pass is spent on it. At beta 0 a completion of
advantage 0 has no gradient, so groups without variance never reach the model; they keep their place in the
denominators and in the rewards that are logged. Completions of a prompt that share a pack have it once there
(`fastpost.trainers.sharing`). GSPO (arXiv:2507.18071) is the same loop with another loss.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastpost.advantages import group_centred
from fastpost.data import Prompt, check_columns, prompts
from fastpost.files import read_rows
from fastpost.models.saving import save_model
from fastpost.rewards import load_reward
from fastpost.rollout import Sampling
from fastpost.shared_prompt import AnyPack
from fastpost.trainers import checkpoint
from fastpost.trainers.config import Grpo
from fastpost.trainers.loop import (
    apply_gradients,
    autocast,
    due,
    learning_rate,
    order,
    rows_to_see,
    seed_of,
    seed_step,
)
from fastpost.trainers.metrics import Metrics, append, say
from fastpost.trainers.plots import plot_metrics
from fastpost.trainers.policy import Reference, backward, policy_packs, predicted_tokens
from fastpost.trainers.rollouts import Task, first_group, greedy_reward, roll_out, rollout_metrics
from fastpost.trainers.sharing import shares_prompts


def grpo(config: Grpo) -> None:
    """Trains config.model on the prompts of config.dataset and leaves the result in config.output_dir."""
    checkpoint.check_output_dir(config)
    task = _task(config)
    rows = {name: _rows(path) for name, path in (("train", config.dataset), ("eval", config.eval_dataset)) if path}
    start = checkpoint.start(config)
    model, tokenizer = start.model, start.tokenizer
    data = {name: _prompts(name, part, tokenizer, config) for name, part in rows.items()}
    reference = Reference.of(start, config) if config.beta else None
    shared = shares_prompts(model, config)
    G, iterations, asked = config.num_generations, config.num_iterations, data["train"]
    each = config.rows_per_step // G  # prompts of a round
    stop = rows_to_see(config, len(asked), each, iterations)
    total = math.ceil(stop / each) * iterations

    output = Path(config.output_dir)
    checkpoint.set_later_aside(output, start.step)
    metrics = Metrics(output, "grpo", start.step, total, start.num_tokens)
    for step in range(start.step, total, iterations):
        seed_step(config.seed, step)
        done, first = step + iterations, step // iterations * each
        last = min(first + each, stop)
        chosen = [asked[i] for i in order(len(asked), config.seed, first, last)]
        sampling = replace(task.sampling, seed=seed_of(config.seed, step))
        rollouts = roll_out(model, tokenizer, chosen, replace(task, sampling=sampling), G, step)
        advantages = group_centred(rollouts.scores.rewards, G, config.scale_rewards)
        packs = policy_packs(rollouts, advantages, config, shared=shared)
        packs = packs if reference is None else [reference.scored(packed) for packed in packs]
        facts, tokens = rollout_metrics(rollouts, G), predicted_tokens(rollouts, config)
        unscored = int(rollouts.scores.rewards.isnan().sum())
        if unscored:
            say(f"step {step + 1}: no reward function applied to {unscored} of {len(rollouts.texts)} completions")
        for at in range(step, done):
            packs, values = update(model, start.optimizer, packs, tokens, learning_rate(config, at, total), config)
            metrics.add(facts | values, rollouts.num_tokens)
        evaluated = "eval" in data and (due(step, done, config.eval_steps) or done == total)
        if evaluated:
            metrics.note({"eval_reward": greedy_reward(model, tokenizer, data["eval"], task)})
        if evaluated or due(step, done, config.logging_steps) or done == total:
            metrics.write(done, last / len(asked))
            append(output / "completions.jsonl", first_group(rollouts, G, done))
        if due(step, done, config.save_steps):
            checkpoint.save(config, start, done, metrics.num_tokens)
    metrics.close()
    save_model(model, tokenizer, output)
    plot_metrics(output)
    say(f"saved {config.output_dir}")


def update(
    model: Any, optimizer: torch.optim.Optimizer, packs: list[AnyPack], tokens: int, rate: float, config: Grpo
) -> tuple[list[AnyPack], dict[str, float]]:
    """One optimizer step on the packs; returns them with old_logp, and what the log shows of the step."""
    began = time.perf_counter()
    packs, values = backward(model, packs, tokens, config)
    # With no gradient at all AdamW would still move the model, by momentum and decay alone.
    norm = apply_gradients(model, optimizer, rate, config.max_grad_norm) if packs else 0.0
    return packs, values | {"grad_norm": norm, "learning_rate": rate, "step_time/update": time.perf_counter() - began}


def _task(config: Grpo) -> Task:
    sampling = Sampling(config.temperature, config.top_p, config.top_k, config.min_p, config.max_completion_length)
    rewards = [load_reward(spec) for spec in config.reward]
    return Task(rewards, config.reward_weights, sampling, config.generation_batch_size, autocast(config))


def _rows(path: str) -> Any:
    rows = read_rows(path)
    check_columns(rows, "grpo", path)
    return rows


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
