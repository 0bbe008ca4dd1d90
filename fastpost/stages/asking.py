"""Prompts -> groups of answers with their rewards, a batch at a time, each kept in a journal when it is done.

Samples are keyed by the seed, the turn, the prompt and the number of the answer (`fastpost.rollout.keyed`): what a
stage gives is the same wherever it was stopped, and whatever its batches are, but for the rounding of the logits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastpost.data import Prompt, check_columns, prompt_examples
from fastpost.files import read_rows
from fastpost.models.trunk import positions
from fastpost.rollout import Completion
from fastpost.stages.config import Asking
from fastpost.stages.groups import Answer, Group
from fastpost.stages.journal import Journal
from fastpost.stages.jury import Jury
from fastpost.stages.policy import Policy
from fastpost.trainers.config import Conversing
from fastpost.trainers.log import say
from fastpost.trainers.loop import seed_of
from fastpost.turns import load_tools

T = TypeVar("T")
FREE = ("output_dir", "generation_batch_size", "reward_timeout")  # they decide no result


def schemas_of(config: Asking) -> list[Any] | None:
    """Of the tools that prompts show; None: an answer has one turn."""
    if not isinstance(config, Conversing) or not config.converses:
        return None
    return [tool.schema for tool in load_tools(config.tools)]


def read_prompts(config: Asking, tokenizer: Any, path: str | None = None) -> list[Prompt]:
    """Those of the data set, or of another; what was left out of it is said."""
    path = config.dataset if path is None else path
    rows = read_rows(path)
    check_columns(rows, "grpo", path)
    prompts, counts = prompt_examples(rows, tokenizer, config.max_prompt_length, path=path, tools=schemas_of(config))
    say(f"{path}: {counts}")
    return prompts


def journal_of(config: Asking, name: str = "work", free: Collection[str] = ()) -> Journal:
    """OUT/work.jsonl, of the fields that decide what is done: not those that are `free` for all stages, or for this."""
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in {*FREE, *free}}
    return Journal(Path(config.output_dir) / f"{name}.jsonl", {"stage": type(config).__name__.lower(), **given})


@dataclass(frozen=True)
class Asker:
    """Who is asked one thing after another, and where the answers are kept."""

    policy: Policy
    config: Asking
    journal: Journal

    def groups(
        self, prompts: Mapping[int, Prompt], turn: str, num_generations: int = 1, jury: Jury | None = None
    ) -> list[Group]:
        """So many answers to each prompt, which has a key."""
        how = {"jury": jury, "turn": turn, "keys": list(prompts)}
        size = self.config.generation_batch_size
        return list(asked(self.policy, list(prompts.values()), num_generations, self.journal, size, **how))

    def answers(self, prompts: Mapping[int, Prompt], turn: str) -> dict[int, Answer]:
        """One to each, by its key."""
        return {group.key: group.answers[0] for group in self.groups(prompts, turn)}

    def fits(self, prompt: Prompt) -> bool:
        return fits(self.policy, prompt)


def fits(policy: Policy, prompt: Prompt) -> bool:
    """Whether the model has positions for it, and for an answer."""
    room = positions(policy.model)
    return room is None or len(prompt.input_ids) + policy.sampling.max_completion_length <= room


def _check_room(policy: Policy, prompts: Sequence[Prompt]) -> None:
    """Before the first is asked: a prompt that stops a stage half-way costs what was done until then."""
    outgrown = [prompt for prompt in prompts if not fits(policy, prompt)]
    if not outgrown:
        return
    longest, new = max(outgrown, key=lambda prompt: len(prompt.input_ids)), policy.sampling.max_completion_length
    left = (positions(policy.model) or 0) - new
    cut = f"set max_prompt_length {left}, which leaves out what is longer, or " if left > 0 else ""
    raise ValueError(
        f"{len(outgrown)} of {len(prompts)} prompts and max_completion_length {new} are more than the model's "
        f"{positions(policy.model)} positions; the longest has {len(longest.input_ids)} tokens, "
        f"{longest.prompt!r:.60}: {cut}lower max_completion_length"
    )


def asked(
    policy: Policy,
    prompts: Sequence[Prompt],
    num_generations: int,
    journal: Journal,
    batch_size: int,  # completions decoded together
    *,
    jury: Jury | None = None,
    turn: str = "0",  # another gives other samples, and is other work
    keys: Sequence[int] | None = None,  # of the prompts; None: their places
    keep_ids: bool = False,  # answers have their tokens as well
) -> Iterator[Group]:
    """The groups of all prompts, in their order: what is done already is not done again."""
    _check_room(policy, prompts)
    pairs = list(zip(range(len(prompts)) if keys is None else keys, prompts, strict=True))
    size = max(1, batch_size // num_generations)
    for first in range(0, len(pairs), size):
        batch = pairs[first : first + size]
        left = [(key, prompt) for key, prompt in batch if f"{turn}/{key}" not in journal]
        if left:
            groups = _groups(policy, jury, left, num_generations, turn, keep_ids)
            done = {f"{turn}/{key}": [asdict(a) for a in group] for (key, _), group in zip(left, groups, strict=True)}
            journal.add(done)
        for key, prompt in batch:
            answers = [Answer(**answer) for answer in journal[f"{turn}/{key}"]]
            yield Group(key, prompt.prompt, prompt.columns, answers)


@torch.no_grad()
def _groups(
    policy: Policy, jury: Jury | None, pairs: Sequence[tuple[int, Prompt]], n: int, turn: str, keep_ids: bool
) -> list[list[Answer]]:
    """n answers to each prompt."""
    keys, prompts = [key for key, _ in pairs], [prompt for _, prompt in pairs]
    sampling = replace(policy.sampling, seed=seed_of(policy.sampling.seed, turn))
    with policy.precision:
        found = policy.sampler_of(prompts)([prompt.input_ids for prompt in prompts], sampling, n, keys)
    texts = policy.tokenizer.batch_decode([_own(each, each.ids) for each in found], skip_special_tokens=True)
    answers = [_answer(text, each, keep_ids) for text, each in zip(texts, found, strict=True)]
    if jury is not None:
        repeated = [prompt for prompt in prompts for _ in range(n)]
        answers = jury.judged(repeated, answers, [completion.ids for completion in found])
    return [answers[i * n : (i + 1) * n] for i in range(len(prompts))]


def _own(completion: Completion, values: Sequence[T]) -> list[T]:
    """Those of the tokens that the policy sampled."""
    return [value for value, own in zip(values, completion.mask, strict=True) if own]


def _answer(text: str, completion: Completion, keep_ids: bool) -> Answer:
    """What is kept of a completion."""
    logp = _own(completion, completion.logp) if completion.logp else None
    return Answer(
        text,
        sum(completion.mask),
        completion.finished,
        None if logp is None else sum(logp),
        ids=completion.ids if keep_ids else None,
        own=completion.own or None if keep_ids else None,
        messages=completion.messages or None,
        events=completion.events or None,
    )
