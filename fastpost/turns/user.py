"""Who answers as the user between turns: a Python function, or a second model.

function   f(messages, columns by name...) -> what the user says next, or None: the conversation is over
model      is shown the conversation with the roles exchanged, behind a system message: the row's column `user_prompt`,
           or one of ours. It ends the conversation by saying END.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from fastpost.data.chat import Messages, render
from fastpost.files import Row
from fastpost.models.loading import load_model
from fastpost.models.trunk import causal_lm, positions
from fastpost.rewards.load import user_function
from fastpost.rollout import Sampling
from fastpost.rollout.sampler import Generate, Sampler
from fastpost.turns.bench import Bench, Limits

END = "END"
PROMPT = (
    f"You are the user who talks to an assistant. Say what the user would say next; say {END} when you are content."
)
EXCHANGED = {"user": "assistant", "assistant": "user"}


class User(Protocol):
    def __call__(
        self, conversations: Sequence[Messages], rows: Sequence[Row], keys: Sequence[int], seed: int
    ) -> list[str | None]:
        """What the user of each says; None: nothing more; empty: could not say it."""
        ...


@dataclass(frozen=True)
class Scripted:
    """A function, which runs as tools do. One that fails ends the run: it is no part of what is learnt."""

    bench: Bench
    name: str
    columns: frozenset[str] | None  # that it takes; None: all

    def __call__(
        self, conversations: Sequence[Messages], rows: Sequence[Row], keys: Sequence[int], seed: int
    ) -> list[str | None]:
        calls = []
        for messages, row in zip(conversations, rows, strict=True):
            taken = {name: value for name, value in row.items() if self.columns is None or name in self.columns}
            calls.append((self.name, {**taken, "messages": messages}))
        found = self.bench.run(calls)
        for outcome in found:
            if outcome.status not in ("ok", "nothing"):
                raise ValueError(f"user {self.name!r}: {outcome.status} {outcome.text}".rstrip())
        return [None if outcome.status == "nothing" else outcome.text for outcome in found]


@dataclass(frozen=True)
class Simulated:
    """A model."""

    sampler: Sampler
    tokenizer: Any
    sampling: Sampling
    room: int | None  # positions of the model

    @torch.no_grad()
    def __call__(
        self, conversations: Sequence[Messages], rows: Sequence[Row], keys: Sequence[int], seed: int
    ) -> list[str | None]:
        prompts = [
            render(self.tokenizer, exchanged(messages, row), {}, "what the user is shown", open_turn=True)[0]
            for messages, row in zip(conversations, rows, strict=True)
        ]
        new = self.sampling.max_completion_length
        fit = [i for i, prompt in enumerate(prompts) if self.room is None or len(prompt) + new <= self.room]
        asked = replace(self.sampling, seed=seed)
        found = self.sampler([prompts[i] for i in fit], asked, 1, [keys[i] for i in fit]) if fit else []
        texts = [self.tokenizer.decode(each.ids, skip_special_tokens=True) for each in found]
        said: list[str | None] = [""] * len(prompts)
        for i, text in zip(fit, texts, strict=True):
            said[i] = None if END in text else text.strip()
        return said


def exchanged(messages: Messages, row: Row) -> Messages:
    """The conversation as the user sees it: what is said to them is a user's, calls and tools are unseen."""
    seen = [
        {"role": EXCHANGED[message["role"]], "content": message["content"]}
        for message in messages
        if message["role"] in EXCHANGED and message.get("content")
    ]
    return [{"role": "system", "content": row.get("user_prompt") or PROMPT}, *seen]


def load_user(spec: str, limits: Limits, sampling: Sampling, device: torch.device) -> User:
    """`file.py:function`, or the directory of a model."""
    if Path(spec).expanduser().is_dir():
        model, tokenizer = load_model(spec, dtype="bfloat16" if device.type == "cuda" else "float32")
        asked = Generate(model.requires_grad_(False).to(device).eval(), tokenizer)
        return Simulated(asked, tokenizer, sampling, positions(causal_lm(model)))
    function = user_function(spec, "user")
    parameters = inspect.signature(function).parameters
    if "messages" not in parameters:
        raise ValueError(f"user {spec!r} must take the conversation as `messages`, got {', '.join(parameters)}")
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    file, name = str(Path(spec.rpartition(":")[0]).expanduser().resolve()), function.__name__
    return Scripted(Bench({name: (file, name)}, limits), name, None if everything else frozenset(parameters))
