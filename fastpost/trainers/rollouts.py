"""Prompts -> completions -> scores: the first half of every RL step, and all of an evaluation by reward."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastpost import metrics
from fastpost.data import Prompt
from fastpost.rewards import Reward, Scores, given_reward, load_reward, score
from fastpost.rollout import Completion, Sampling, generate
from fastpost.trainers.config import Grpo
from fastpost.trainers.given import GivenRewards
from fastpost.trainers.log import say
from fastpost.trainers.loop import autocast


@dataclass(frozen=True)
class Task:
    """How completions are drawn and how they are judged."""

    rewards: Sequence[Reward]
    weights: Sequence[float] | None  # None: 1 each
    sampling: Sampling
    batch_size: int = 256  # completions decoded together
    precision: AbstractContextManager = field(default_factory=nullcontext)  # of generation


def task_of(config: Grpo, given: GivenRewards) -> Task:
    """As the config has it, with the reward functions that the caller gives."""
    funcs = given.get("reward_funcs") or []
    rewards = [load_reward(spec) for spec in config.reward]
    rewards += [given_reward(function) for function in (funcs if isinstance(funcs, list | tuple) else [funcs])]
    if not rewards:
        raise ValueError("reward must name at least one function: a built-in name or file.py:function")
    weights = config.reward_weights
    if weights is not None and len(weights) != len(rewards):
        raise ValueError(
            f"reward_weights must hold one number for each of the {len(rewards)} rewards, got {len(weights)}"
        )
    sampling = Sampling(config.temperature, config.top_p, config.top_k, config.min_p, config.max_completion_length)
    return Task(rewards, weights, sampling, config.generation_batch_size, autocast(config))


@dataclass(frozen=True)
class Rollouts:
    """S completions with their scores, the completions of a prompt adjacent."""

    prompts: list[Prompt]  # S: each repeated for its completions
    completions: list[Completion]
    texts: list[str]
    scores: Scores
    seconds: dict[str, float]

    @property
    def num_tokens(self) -> int:
        """Of prompts and completions."""
        pairs = zip(self.prompts, self.completions, strict=True)
        return sum(len(prompt.input_ids) + len(completion.ids) for prompt, completion in pairs)


def roll_out(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], task: Task, num_generations: int = 1, step: int = 0
) -> Rollouts:
    """num_generations completions of each prompt, and what the reward functions think of them."""
    began = time.perf_counter()
    ids = [prompt.input_ids for prompt in prompts]
    with task.precision:
        completions = generate(
            model, tokenizer, ids, task.sampling, num_generations=num_generations, batch_size=task.batch_size
        )
    generated = time.perf_counter()
    repeated = [prompt for prompt in prompts for _ in range(num_generations)]
    token_ids = [completion.ids for completion in completions]
    texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    answers = [_answer(prompt, text) for prompt, text in zip(repeated, texts, strict=True)]
    names = sorted({name for prompt in prompts for name in prompt.columns})
    columns = {name: [prompt.columns.get(name) for prompt in repeated] for name in names}
    asked = [prompt.prompt for prompt in repeated]
    scores = score(task.rewards, task.weights, asked, answers, token_ids, columns, step=step)
    if unscored := int(scores.rewards.isnan().sum()):
        say(f"step {step + 1}: no reward function applied to {unscored} of {len(texts)} completions")
    seconds = {"step_time/rollout": generated - began, "step_time/reward": time.perf_counter() - generated}
    return Rollouts(repeated, completions, texts, scores, seconds)


def _answer(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """A conversation is answered by a message, a text by a text."""
    return text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]


def greedy_reward(model: Any, tokenizer: Any, prompts: Sequence[Prompt], task: Task) -> float:
    """Mean reward of the likeliest completions, one a prompt."""
    greedy = replace(task, sampling=replace(task.sampling, temperature=0.0))
    return float(roll_out(model, tokenizer, prompts, greedy).scores.rewards.nanmean())


# ---- what a log shows of them ----


def rollout_metrics(rollouts: Rollouts, num_generations: int) -> dict[str, float]:
    """Rewards, lengths and times, by TRL's names. All completions count here, those without an advantage too."""
    groups = rollouts.scores.rewards.view(-1, num_generations)
    lengths = torch.tensor([len(completion.ids) for completion in rollouts.completions])
    finished = torch.tensor([completion.finished for completion in rollouts.completions])
    values = {
        "reward": groups.nanmean(),
        "reward_std": torch.stack([_std(group) for group in groups]).nanmean(),
        "frac_reward_zero_std": (groups == groups[:, :1]).all(1).float().mean(),
    }
    values |= metrics.floats(metrics.completions(lengths, finished))
    for name, each in rollouts.scores.by_function.items():
        values |= {f"rewards/{name}/mean": each.nanmean(), f"rewards/{name}/std": _std(each)}
    return {name: float(value) for name, value in (values | rollouts.scores.metrics | rollouts.seconds).items()}


def _std(values: Tensor) -> Tensor:
    """Of the values that are not NaN; NaN where fewer than two are."""
    given = values[~values.isnan()]
    return given.std() if len(given) > 1 else values.new_full((), torch.nan)


def first_group(rollouts: Rollouts, num_generations: int, step: int) -> Iterator[dict[str, Any]]:
    """A prompt and its completions, as lines of completions.jsonl; a reward that does not apply is null."""
    extra = {name: values for name, values in rollouts.scores.extra.items() if len(values) == len(rollouts.texts)}
    columns = {"reward": rollouts.scores.rewards}
    columns |= {f"rewards/{name}": values for name, values in rollouts.scores.by_function.items()}
    for i in range(num_generations):
        said = {"prompt": rollouts.prompts[i].prompt, "completion": rollouts.texts[i]}
        given = {name: None if values[i].isnan() else float(values[i]) for name, values in columns.items()}
        yield {**{name: values[i] for name, values in extra.items()}, "step": step, **said, **given}
