"""What a verb whose policy samples begins with: its model, its prompts, its rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastpost.data import Prompt, Verb
from fastpost.trainers.checkpoint import check_output_dir
from fastpost.trainers.config import Clipped, Sampled
from fastpost.trainers.examples import read_examples
from fastpost.trainers.given import GivenRewards, read_data
from fastpost.trainers.reference import Reference
from fastpost.trainers.run import Run
from fastpost.trainers.sharing import shares_prompts
from fastpost.trainers.start import Build, Start, policy, start
from fastpost.trainers.task import Task, rewards_of, sampled_prompts, tools_of


@dataclass(frozen=True)
class Stage:
    """What is there before the first step."""

    verb: Verb
    config: Sampled
    begun: Start
    data: Mapping[str, list[Prompt]]  # "train" and perhaps "eval"
    facts: Mapping[str, Any]  # of each of the two, what became of its rows
    task: Task
    reference: Reference | None
    shared: bool  # whether completions in one pack have their common prompt once

    @property
    def model(self) -> Any:
        return self.begun.model

    @staticmethod
    def of(
        verb: Verb, config: Sampled, given: GivenRewards, *, refers: bool = False, build_parts: Build = policy
    ) -> Stage:
        """Data are looked at before the model is loaded, which takes longer. `refers`: there is to be a reference."""
        check_output_dir(config)
        rewards, tools = rewards_of(config, given), tools_of(config, given)
        rows = read_data(config, given, verb)
        begun = start(config, given, build_parts)
        data, facts = read_examples(
            rows, verb, begun.tokenizer, partial(sampled_prompts, begun.tokenizer, config, tools)
        )
        task = Task.of(config, rewards, begun.model, begun.tokenizer, begun.world, tools)
        reference = Reference.of(begun, config, given) if refers else None
        with begun.world.whole():
            shared = isinstance(config, Clipped) and shares_prompts(begun.model, config)
        return Stage(verb, config, begun, data, facts, task, reference, shared)

    def run(self) -> Run:
        each = self.config.rows_per_round // self.config.num_generations  # prompts of a round
        return Run(
            self.verb,
            self.config,
            self.begun,
            len(self.data["train"]),
            each=each,
            iterations=self.config.updates_per_round,
            data=self.facts,
        )
