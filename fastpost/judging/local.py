"""A judge that is loaded here: it reasons by sampling, and its verdict is read off the next token.

After the reasons and `Verdict:` the log-probability of every option is taken by the fused head, from the first token in
which they differ, so there is always a verdict. An option of several tokens has the sum of them; of one that another
begins with, as 1 of 10, what goes on to the other is taken off: p(1) - p(10).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastpost import Head, token_stats
from fastpost.data.chat import common_prefix, inert
from fastpost.judging.asking import Reply
from fastpost.judging.wording import Request
from fastpost.models.loading import load_model
from fastpost.models.trunk import causal_lm, hidden_states, positions, takes_shared_prompts
from fastpost.packing import Example, pack
from fastpost.rollout import Sampling, generate
from fastpost.shared_prompt import share_prompts
from fastpost.trainers.loop import the_device


@dataclass(frozen=True)
class Local:
    """A model and how it is asked."""

    model: Any
    tokenizer: Any
    sampling: Sampling | None  # of the reasons; None: none
    batch_size: int

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Replies, a batch at a time."""
        texts = [self._opened(request) for request in requests]
        fits = []
        for i, text in enumerate(texts):
            error = self._too_long(len(self._ids(text)))
            if error is None:
                fits.append(i)
            else:
                yield i, Reply(error=error)
        for start in range(0, len(fits), self.batch_size):
            rows = fits[start : start + self.batch_size]
            reasons = self._reasons([texts[i] for i in rows], [requests[i] for i in rows])
            for i, reason in zip(rows, reasons, strict=True):
                lead = f"{reason}{requests[i].lead}:"
                logp = self._options(texts[i] + lead, requests[i].options)
                yield i, Reply(f"{lead} {max(logp, key=logp.__getitem__)}", logp)

    def _opened(self, request: Request) -> str:
        """The question up to where the judge is to speak. What it is asked about does not speak to it as somebody."""
        messages = [{**message, "content": inert(message["content"], self.tokenizer)} for message in request.messages]
        if not getattr(self.tokenizer, "chat_template", None):
            return "\n\n".join(message["content"] for message in messages) + "\n\n"
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _ids(self, text: str) -> list[int]:
        """A template has written what a sequence begins with."""
        return self.tokenizer(text, add_special_tokens=not self.tokenizer.chat_template).input_ids

    def _too_long(self, tokens: int) -> str | None:
        room = positions(self.model)
        more = 16 if self.sampling is None else self.sampling.max_completion_length + 16  # the verdict itself
        if room is None or tokens + more <= room:
            return None
        return f"has {room} positions, fewer than the {tokens} tokens of the question and {more} of the answer"

    def _reasons(self, texts: Sequence[str], requests: Sequence[Request]) -> list[str]:
        """What is said before the verdict."""
        if self.sampling is None:
            return [""] * len(texts)
        lead = f"{requests[0].lead}:"
        sampling = replace(self.sampling, stop=(lead,))
        ids, keys = [self._ids(text) for text in texts], [_key(request) for request in requests]
        found = generate(self.model, self.tokenizer, ids, sampling, keys=keys, batch_size=self.batch_size)
        said = self.tokenizer.batch_decode([completion.ids for completion in found], skip_special_tokens=True)
        return [text.split(lead)[0].rstrip() + "\n" for text in said]

    def _options(self, text: str, options: Sequence[str]) -> dict[str, float]:
        """The log-probability of each after the text."""
        rows = [self._ids(f"{text} {option}") for option in options]
        shared = min(common_prefix(rows[0], row) for row in rows)
        shared -= any(len(row) == shared for row in rows)  # one that another begins with still has a token to score
        examples = [Example(row, [i >= shared for i in range(len(row))]) for row in rows]
        packed = pack(examples)
        if takes_shared_prompts(self.model):
            packed = share_prompts(packed, len(rows))
        packed = packed.to(causal_lm(self.model).device)
        hidden = hidden_states(self.model, packed)[0]
        logp = token_stats(hidden, Head.of(self.model), packed.batch.target).logp
        sums = packed.batch.per_sequence(logp).double().tolist()
        return without_longer(dict(zip(options, sums, strict=True)), dict(zip(options, rows, strict=True)))


def without_longer(logp: Mapping[str, float], rows: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Of each option alone: less what goes on to another whose tokens begin with its own."""
    alone = {}
    for name, row in rows.items():
        longer = [logp[other] for other, its in rows.items() if len(its) > len(row) and its[: len(row)] == row]
        left = 1 - sum(math.exp(each - logp[name]) for each in longer)
        alone[name] = logp[name] + math.log(max(left, 1e-300))
    return alone


def _key(request: Request) -> int:
    """Samples belong to the question, not to its place in a batch."""
    said = repr((request.messages, request.vote)).encode()
    return int.from_bytes(hashlib.sha256(said).digest()[:7])


def local(
    path: str, *, dtype: str, reasoning: bool, temperature: float, max_tokens: int, seed: int, batch_size: int
) -> Local:
    """The judge of a directory, where there is a GPU on that."""
    device = the_device()
    auto = "bfloat16" if device.type == "cuda" else "float32"
    model, tokenizer = load_model(path, dtype=auto if dtype == "auto" else dtype)
    model.requires_grad_(False).to(device).eval()
    sampling = Sampling(temperature=temperature, max_completion_length=max_tokens, seed=seed) if reasoning else None
    return Local(model, tokenizer, sampling, batch_size)
