"""Dense rewards, `--reward DIR:dense`: where the steps of a completion end among its tokens, and what each earns.

A completion of several turns is judged by its last one: what was said before is part of the question there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fastpost.data import Prompt
from fastpost.data.chat import rendered
from fastpost.data.steps import ended_steps, last_tokens, text_of_tokens
from fastpost.packing import Packed
from fastpost.rewards import Reward
from fastpost.rewards.steps import DENSE, StepRewards
from fastpost.rollout import Completion


@dataclass(frozen=True)
class Dense:
    """A model that judges steps, each of which counts."""

    name: str
    judge: StepRewards
    weight: float


@dataclass(frozen=True)
class Steps:
    """What it gives to S completions: to each step a reward, and the index of the step's last token in its
    completion."""

    weight: float
    rows: list[list[tuple[int, float]]]

    @property
    def means(self) -> Tensor:  # (S,); NaN: there is no step
        return torch.tensor([fmean(reward for _, reward in row) if row else torch.nan for row in self.rows])


def parted(rewards: Sequence[Reward], weights: Sequence[float] | None) -> tuple[list[Reward], list[float], list[Dense]]:
    """Those that judge completions, with their weights, and those that judge steps."""
    whole, of_whole, of_steps = [], [], []
    for reward, weight in zip(rewards, [1.0] * len(rewards) if weights is None else weights, strict=True):
        judge = reward.function
        if isinstance(judge, StepRewards) and judge.way == DENSE:
            of_steps.append(Dense(reward.name, judge, weight))
        else:
            whole.append(reward)
            of_whole.append(weight)
    names = [one.name for one in of_steps]
    if len(set(names)) < len(names):
        raise ValueError(f"reward must not give two models of steps one name, got {', '.join(names)}")
    return whole, of_whole, of_steps


def rewarded(dense: Dense, tokenizer: Any, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Steps:
    """The steps of these completions; of one without a token there are none, nor of one that is too long to be
    judged."""
    rows: list[list[tuple[int, float]]] = [[] for _ in completions]
    written = [i for i, completion in enumerate(completions) if completion.ids]
    if written:
        turns = [_last_turn(completions[i]) for i in written]
        texts = [text_of_tokens(tokenizer, turn) for turn in turns]
        columns = {name: [prompts[i].columns[name] for i in written] for name in rendered(prompts[0].columns)}
        said = dense.judge.of_steps([_asked(prompts[i], completions[i]) for i in written], texts, None, **columns)
        for i, turn, text, numbers in zip(written, turns, texts, said, strict=True):
            if not numbers:
                continue
            ends = last_tokens(tokenizer, turn, [end for _, end in ended_steps(text, dense.judge.separator)])
            before = len(completions[i].ids) - len(turn)
            rows[i] = [(before + end, number) for end, number in zip(ends, numbers, strict=True)]
    return Steps(dense.weight, rows)


def _last_turn(completion: Completion) -> list[int]:
    """The tokens behind all that somebody else said."""
    others = [i for i, own in enumerate(completion.mask) if not own]
    return completion.ids[others[-1] + 1 if others else 0 :]


def _asked(prompt: Prompt, completion: Completion) -> Any:
    """The prompt, and all but the last turn."""
    return [*prompt.prompt, *completion.messages[:-1]] if completion.messages else prompt.prompt


def placed(steps: Steps, prompts: Sequence[Prompt], whole: Packed) -> tuple[Tensor, Tensor]:  # (N,), (N,) int64
    """The rewards of all steps, and their positions in the pack of prompts and completions."""
    starts = accumulate(whole.batch.lengths.tolist(), initial=0)
    first = [start + len(prompt.input_ids) - 1 for start, prompt in zip(starts, prompts, strict=False)]
    found = [(reward, before + end) for before, row in zip(first, steps.rows, strict=True) for end, reward in row]
    rewards, at = zip(*found, strict=True) if found else ((), ())
    return torch.tensor(rewards, dtype=torch.float32), torch.tensor(at, dtype=torch.int64)
