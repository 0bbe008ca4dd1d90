"""What a policy is asked, how it samples, and how that is judged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastpost.data import Counts, Prompt, prompt_examples
from fastpost.files import Rows
from fastpost.models.adapters import base_of, is_adapter
from fastpost.rewards import Reward, given_reward, load_reward, told_apart
from fastpost.rollout import Sampling
from fastpost.rollout.backends import sampler_for
from fastpost.rollout.record import Where
from fastpost.rollout.sampler import Sampler
from fastpost.trainers.checkpoint import fingerprint
from fastpost.trainers.config import Conversing, Sampled
from fastpost.trainers.dense import Dense, parted
from fastpost.trainers.given import GivenRewards
from fastpost.trainers.log import say
from fastpost.trainers.loop import autocast
from fastpost.trainers.world import ALONE, World
from fastpost.turns import Tool, Turns, load_tools, load_turns


@dataclass(frozen=True)
class Task:
    """How completions are drawn and how they are judged."""

    sampler: Sampler
    tokenizer: Any
    rewards: Sequence[Reward]
    weights: Sequence[float] | None  # None: 1 each
    sampling: Sampling
    precision: AbstractContextManager = field(default_factory=nullcontext)  # of generation
    world: World = ALONE
    timeout: float | None = None  # seconds that a reward function may take
    where: Where | None = None  # what a sampler would not give again is recorded here
    run: str = ""  # of what else decides what is sampled
    dense: Sequence[Dense] = ()  # who judges their steps
    turns: Turns | None = None  # what is said between turns of the policy; None: it has one

    def sampler_of(self, prompts: Sequence[Prompt]) -> Sampler:
        return self.sampler if self.turns is None else self.turns.sampler(self.sampler, prompts)

    def seeded(self, seed: int) -> Task:
        return replace(self, sampling=replace(self.sampling, seed=seed))

    @staticmethod
    def of(
        config: Sampled,
        rewards: Sequence[Reward],
        model: Any,
        tokenizer: Any,
        world: World = ALONE,
        tools: Sequence[Tool] = (),
    ) -> Task:
        sampling = config.sampling()
        name = base_of(config.model) if is_adapter(config.model) else config.model
        sampler = sampler_for(config.backend, model, tokenizer, name, sampling, say, config.generation_batch_size)
        whole, weights, dense = parted(rewards, config.reward_weights and config.reward_weights[: len(rewards)])
        where = Where(Path(config.output_dir), world.rank)
        return Task(
            sampler,
            tokenizer,
            whole,
            weights,
            sampling,
            autocast(config),
            world,
            config.reward_timeout,
            where,
            fingerprint(config),
            dense,
            turns_of(config, tools, model, tokenizer, sampling),
        )


def turns_of(config: Conversing, tools: Sequence[Tool], model: Any, tokenizer: Any, sampling: Sampling) -> Turns | None:
    """What is between the turns of a model; None: it has one."""
    if not tools and not config.user:
        return None
    return load_turns(
        tools,
        model,
        tokenizer,
        config.tool_limits,
        sampling,
        say,
        max_tool_calling_iterations=config.max_tool_calling_iterations,
        user=config.user,
        max_user_turns=config.max_user_turns,
    )


def tools_of(config: Sampled, given: GivenRewards) -> list[Tool]:
    """What the policy may call: those that the config names and that the caller gives."""
    return load_tools(config.tools, given.get("tools") or [])


def rewards_of(config: Sampled, given: GivenRewards) -> list[Reward]:
    """The reward functions that the config names and that the caller gives; none need be where another judges."""
    model = getattr(config, "reward_model", None) is not None
    compared = getattr(config, "judge", None) is not None or given.get("prefer") is not None
    funcs = given.get("reward_funcs") or []
    found = [load_reward(spec, of_steps=config.rewards_steps) for spec in config.reward]
    found += [given_reward(function) for function in (funcs if isinstance(funcs, list | tuple) else [funcs])]
    if not found and not model and not compared:
        raise ValueError("reward must name at least one function, a built-in or file.py:function; or give reward_funcs")
    weights, wanted = config.reward_weights, len(found) + model
    if weights is not None and len(weights) != wanted:
        raise ValueError(f"reward_weights must hold one number for each of the {wanted} rewards, got {len(weights)}")
    return told_apart(found)


def sampled_prompts(
    tokenizer: Any, config: Sampled, tools: Sequence[Tool], name: str, rows: Rows
) -> tuple[list[Prompt], Counts]:
    """The prompts of "train" or "eval", none so long that a completion would not fit in a pack beside it."""
    schemas = [tool.schema for tool in tools] if tools or config.user else None
    found, counts = prompt_examples(rows, tokenizer, config.max_prompt_length, path=name, tools=schemas)
    longest = counts.longest + config.max_completion_length
    if config.max_tokens_per_batch is not None and longest > config.max_tokens_per_batch:
        raise ValueError(
            f"max_tokens_per_batch must hold the longest prompt and max_completion_length, {longest} tokens together, "
            f"got {config.max_tokens_per_batch}"
        )
    return found, counts
