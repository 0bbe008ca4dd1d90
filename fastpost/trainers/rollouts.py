"""Prompts -> completions -> scores: the first half of every RL step, and all of an evaluation by reward."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from fastpost import metrics
from fastpost.advantages import missing_eos_penalty, soft_overlong_punishment
from fastpost.data import Messages, Prompt
from fastpost.rewards import Scores, score
from fastpost.rollout import Completion
from fastpost.rollout.record import Asked, sampled
from fastpost.trainers.config import Sampled
from fastpost.trainers.dense import Steps, rewarded
from fastpost.trainers.log import say
from fastpost.trainers.task import Task
from fastpost.turns.metrics import turn_metrics


@dataclass(frozen=True)
class Rollouts:
    """S completions with their scores, the completions of a prompt adjacent."""

    prompts: list[Prompt]  # S: each repeated for its completions
    completions: list[Completion]
    texts: list[str]
    scores: Scores
    seconds: dict[str, float]
    steps: dict[str, Steps] = field(default_factory=dict)  # by the name of the reward that judges them

    @property
    def rewards(self) -> Tensor:  # (S,) with the mean reward of the steps: what is shown, and tells completions apart
        if not self.steps:
            return self.scores.rewards
        of_steps = [steps.weight * steps.means.nan_to_num(0.0) for steps in self.steps.values()]
        return self.scores.rewards.nan_to_num(0.0) + torch.stack(of_steps).sum(0)

    @property
    def by_function(self) -> dict[str, Tensor]:  # (S,) each
        return self.scores.by_function | {name: steps.means for name, steps in self.steps.items()}

    @property
    def answers(self) -> list[str | Messages]:
        return answers_of(self.prompts, self.completions, self.texts)

    @property
    def lengths(self) -> Tensor:  # (S,) tokens of the completions that the policy sampled
        return torch.tensor([sum(completion.mask) for completion in self.completions])

    @property
    def finished(self) -> Tensor:  # (S,) bool
        return torch.tensor([completion.finished for completion in self.completions])

    @property
    def num_tokens(self) -> int:
        """Of prompts and completions."""
        pairs = zip(self.prompts, self.completions, strict=True)
        return sum(len(prompt.input_ids) + len(completion.ids) for prompt, completion in pairs)


def roll_out(
    task: Task, prompts: Sequence[Prompt], num_generations: int = 1, step: int = 0, keys: Sequence[int] | None = None
) -> Rollouts:
    """num_generations completions of each prompt, and what the reward functions think of them. Samples of a prompt
    depend on the seed of the task and on the prompt's key alone; None: its place among these. Every process samples and
    scores some of them, and has all of them in the end."""
    world, keys = task.world, range(len(prompts)) if keys is None else keys
    own, own_keys = world.slice(prompts), world.slice(keys)
    with world.whole():
        mine = [_rolled_out(task, own, num_generations, step, own_keys)] if own else []
    parts = world.gathered(mine)
    seconds = {name: max(part.seconds[name] for part in parts) for name in parts[0].seconds}
    return replace(joined(parts), seconds=seconds)


def _rolled_out(
    task: Task, prompts: Sequence[Prompt], num_generations: int, step: int, keys: Sequence[int]
) -> Rollouts:
    """Those of this process."""
    began = time.perf_counter()
    with task.precision:
        asked = Asked([p.input_ids for p in prompts], keys, task.sampling, num_generations, task.run)
        completions = sampled(task.sampler_of(prompts), asked, task.where, step)
    generated = time.perf_counter()
    repeated = [prompt for prompt in prompts for _ in range(num_generations)]
    token_ids = [completion.ids for completion in completions]
    texts = task.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    answers = answers_of(repeated, completions, texts)
    names = sorted({name for prompt in prompts for name in prompt.columns})
    columns = {name: [prompt.columns.get(name) for prompt in repeated] for name in names}
    questions = [prompt.prompt for prompt in repeated]
    if task.rewards:
        given = (task.rewards, task.weights, questions, answers, token_ids, columns)
        scores = score(*given, step=step, timeout=task.timeout)
    else:
        scores = Scores(torch.zeros(len(texts)), {}, {})  # a reward model judges, or steps are
    if unscored := int(scores.rewards.isnan().sum()):
        say(f"step {step + 1}: no reward function applied to {unscored} of {len(texts)} completions")
    steps = {dense.name: rewarded(dense, task.tokenizer, repeated, completions) for dense in task.dense}
    for name, of in steps.items():
        if unjudged := sum(not row for row in of.rows):
            say(f"step {step + 1}: {name} judged no step of {unjudged} of {len(texts)} completions")
    seconds = {"step_time/rollout": generated - began, "step_time/reward": time.perf_counter() - generated}
    return Rollouts(repeated, completions, texts, scores, seconds, steps)


def answers_of(
    prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]
) -> list[str | Messages]:
    """Completions as whoever judges them sees them: of several turns all messages."""
    return [
        completion.messages or prompt.answered(text)
        for prompt, completion, text in zip(prompts, completions, texts, strict=True)
    ]


def only_groups(rollouts: Rollouts, num_generations: int, groups: Sequence[int]) -> Rollouts:
    """The completions of these prompts alone."""
    rows = [group * num_generations + i for group in groups for i in range(num_generations)]
    scores, at = rollouts.scores, torch.tensor(rows, dtype=torch.int64)
    extra = {name: [each[i] for i in rows] for name, each in scores.extra.items() if len(each) == len(rollouts.texts)}
    of_rows = Scores(
        scores.rewards[at], {name: each[at] for name, each in scores.by_function.items()}, scores.metrics, extra
    )
    return Rollouts(
        [rollouts.prompts[i] for i in rows],
        [rollouts.completions[i] for i in rows],
        [rollouts.texts[i] for i in rows],
        of_rows,
        rollouts.seconds,
        {name: replace(steps, rows=[steps.rows[i] for i in rows]) for name, steps in rollouts.steps.items()},
    )


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """All of them. Times add up; what reward functions logged is the mean over the parts that have it."""
    scores = [part.scores for part in parts]
    logged = [each.metrics for each in scores]
    names = dict.fromkeys(chain(*logged))
    means = {name: mean(each[name] for each in logged if name in each) for name in names}
    shared = [name for name in scores[0].extra if all(name in each.extra for each in scores)]
    extra = {name: list(chain(*(each.extra[name] for each in scores))) for name in shared}
    by_function = {name: torch.cat([each.by_function[name] for each in scores]) for name in scores[0].by_function}
    steps = {
        name: replace(of, rows=list(chain(*(part.steps[name].rows for part in parts))))
        for name, of in parts[0].steps.items()
    }
    return Rollouts(
        list(chain(*(part.prompts for part in parts))),
        list(chain(*(part.completions for part in parts))),
        list(chain(*(part.texts for part in parts))),
        Scores(torch.cat([each.rewards for each in scores]), by_function, means, extra),
        {name: sum(part.seconds[name] for part in parts) for name in parts[0].seconds},
        steps,
    )


def greedy(task: Task, prompts: Sequence[Prompt]) -> Rollouts:
    """The likeliest completions, one a prompt."""
    return roll_out(replace(task, sampling=replace(task.sampling, temperature=0.0), where=None), prompts)


def greedy_reward(task: Task, prompts: Sequence[Prompt]) -> float:
    """Their mean reward."""
    return float(greedy(task, prompts).rewards.nanmean())


def judged(rollouts: Rollouts, name: str, numbers: Tensor, weight: float, seconds: float) -> Rollouts:
    """With the numbers (S,) of one who took so long, added to what the reward functions gave."""
    scores = rollouts.scores
    rewards = scores.rewards.nan_to_num(0.0) + weight * numbers
    took = {"step_time/reward": rollouts.seconds["step_time/reward"] + seconds}
    return replace(
        rollouts,
        scores=replace(scores, rewards=rewards, by_function={**scores.by_function, name: numbers}),
        seconds=rollouts.seconds | took,
    )


def shaped_rewards(rollouts: Rollouts, config: Sampled) -> Tensor:  # (S,); NaN: no function applied
    """The scores of whole completions, less what each pays for its length, or for not coming to an end."""
    found = rollouts.scores.rewards
    if config.missing_eos_penalty is not None:
        found = missing_eos_penalty(found, rollouts.finished, config.missing_eos_penalty)
    if config.soft_punish_cache is not None:
        found = found + soft_overlong_punishment(
            rollouts.lengths, config.max_completion_length, config.soft_punish_cache
        )
    return found


# ---- what a log shows of them ----


def rollout_metrics(rollouts: Rollouts, num_generations: int) -> dict[str, float]:
    """Rewards and lengths, by TRL's names. All completions count here, those without an advantage too."""
    rewards, alone = rollouts.rewards, num_generations == 1
    groups = rewards.view(-1, num_generations)
    values: dict[str, Tensor | float] = {
        "reward": groups.nanmean(),
        "reward_std": _std(rewards) if alone else torch.stack([_std(group) for group in groups]).nanmean(),
    }
    if not alone:  # a completion alone has no group to differ from
        values["frac_reward_zero_std"] = (~varied(groups)).float().mean()
    lengths = rollouts.lengths
    of_lengths = metrics.completions(lengths, rollouts.finished) | metrics.length_correlation(rewards, lengths)
    values |= metrics.floats(of_lengths)
    for name, each in rollouts.by_function.items():
        values |= {f"rewards/{name}/mean": each.nanmean(), f"rewards/{name}/std": _std(each)}
    for name, steps in rollouts.steps.items():
        values[f"rewards/{name}/steps"] = mean(len(row) for row in steps.rows)
    values |= turn_metrics([completion.events for completion in rollouts.completions])
    return {name: float(value) for name, value in (values | rollouts.scores.metrics).items()}


def varied(groups: Tensor) -> Tensor:  # (B, G) -> (B,) bool
    """Whether the rewards of a group that are not NaN are not all one."""
    missing = groups.isnan()
    return groups.masked_fill(missing, -torch.inf).amax(1) > groups.masked_fill(missing, torch.inf).amin(1)


def _std(values: Tensor) -> Tensor:
    """Of the values that are not NaN; NaN where fewer than two are."""
    given = values[~values.isnan()]
    return given.std() if len(given) > 1 else values.new_full((), torch.nan)


def first_group(rollouts: Rollouts, num_generations: int, step: int) -> Iterator[dict[str, Any]]:
    """A prompt and its completions, as lines of completions.jsonl; a reward that does not apply is null."""
    extra = {name: values for name, values in rollouts.scores.extra.items() if len(values) == len(rollouts.texts)}
    columns = {"reward": rollouts.rewards}
    columns |= {f"rewards/{name}": values for name, values in rollouts.by_function.items()}
    for i in range(num_generations):
        said = {"prompt": rollouts.prompts[i].prompt, "completion": rollouts.texts[i]}
        given = {name: None if values[i].isnan() else float(values[i]) for name, values in columns.items()}
        each = {f"rewards/{name}/steps": [reward for _, reward in of.rows[i]] for name, of in rollouts.steps.items()}
        yield {**{name: values[i] for name, values in extra.items()}, "step": step, **said, **given, **each}
