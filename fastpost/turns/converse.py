"""Several turns of a policy: what it says, what tools or a user answer, until it has nothing to ask.

  completion = turn, answers, turn, answers, ..., turn     one sequence behind the prompt, max_completion_length tokens

Turns stay in the tokens that were sampled; answers are of `Frame.tail`, are not the policy's own, and so neither learnt
nor counted. The first turn is what would be sampled without tools. Later ones are keyed by the key of the prompt, the
number of the completion and that of the turn, and depend on nothing else but what the tools said. That need not be the
same again, so a run records its conversations (`fastpost.rollout.record`) and resumes from these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import shake_128
from math import nan
from typing import Any

from fastpost.data import Messages, Prompt
from fastpost.data.chat import inert
from fastpost.rollout import Completion, Sampling
from fastpost.rollout.sampler import Sampler
from fastpost.turns.bench import Bench, Outcome
from fastpost.turns.calls import Parser, Reply
from fastpost.turns.frame import Frame
from fastpost.turns.tools import Tool
from fastpost.turns.user import User

CUT = "\n[{left} of {all} bytes are left out]"


@dataclass
class Talk:
    """A conversation as it goes on."""

    prompt: Prompt
    key: int
    sample: int
    ids: list[int] = field(default_factory=list)  # behind those of the prompt
    own: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    messages: Messages = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    finished: bool = False
    reply: Reply | None = None  # the newest turn, where it is to be answered

    @property
    def context(self) -> list[int]:
        return [*self.prompt.input_ids, *self.ids]

    @property
    def history(self) -> Messages:
        assert not isinstance(self.prompt.prompt, str)
        return [*self.prompt.prompt, *self.messages]

    def key_of(self, turn: int) -> int:
        """Among all turns of all completions of all prompts."""
        return int.from_bytes(shake_128(f"{self.key} {self.sample} {turn}".encode()).digest(8)) >> 1

    def takes(self, ids: Sequence[int], logp: Sequence[float], own: bool) -> None:
        self.ids += ids
        self.logp += logp
        self.own += [own] * len(ids)

    def completion(self, unfiltered: bool) -> Completion:
        logp = self.logp if unfiltered else []
        return Completion(self.ids, self.finished, logp, self.own, self.messages, dict(self.events))


def batches(talks: Sequence[Talk], most: int) -> list[list[Talk]]:
    """Those that may be sampled together: the longest context and the most new tokens of a batch are no more than what
    the first turns had, so they fit in whatever the model has."""
    room = max(len(talk.prompt.input_ids) for talk in talks) + most
    left, found = sorted(talks, key=lambda talk: len(talk.ids)), []
    while left:
        new = most - len(left[0].ids)
        found.append([talk for talk in left if len(talk.context) + new <= room])
        left = [talk for talk in left if len(talk.context) + new > room]
    return found


@dataclass(frozen=True)
class Turns:
    """How a conversation goes on after the first turn."""

    frame: Frame
    parser: Parser
    tools: dict[str, Tool]
    bench: Bench
    max_tool_calling_iterations: int | None = None
    user: User | None = None
    max_user_turns: int = 4

    def sampler(self, sampler: Sampler, prompts: Sequence[Prompt]) -> Conversing:
        """One whose completions of these prompts have several turns."""
        return Conversing(sampler, self, prompts)

    # ---- a turn ----

    def heard(self, talk: Talk, said: Completion, most: int) -> None:
        """The conversation with the newest turn of the policy; it is over, or has a reply that is to be answered."""
        before, ids = talk.context, said.ids[: most - len(talk.ids)]
        talk.takes(ids, said.logp[: len(ids)] or [nan] * len(ids), own=True)
        reply = self.parser(before, ids)
        talk.messages.append(reply.message)
        talk.events["turns"] += 1
        talk.finished, talk.reply = said.finished and len(ids) == len(said.ids), None
        if not talk.finished:
            return
        if self.tools and (reply.calls or reply.wrong):
            limit = self.max_tool_calling_iterations
            talk.finished = False  # it asks for more than it is given
            talk.reply = reply if limit is None or talk.events["iterations"] < limit else None
            talk.events["limited"] += talk.reply is None
            talk.events["iterations"] += talk.reply is not None
        elif self.user is not None and talk.events["user_turns"] < self.max_user_turns:
            talk.reply = reply

    def told(self, talk: Talk, answers: Messages, most: int) -> None:
        """And with the answers to it, if there is room for them and for a word after them."""
        context, row = talk.context, talk.prompt.columns
        ids, as_rendered = self.frame.tail(talk.history, answers, context[-1], row, context)
        if len(talk.ids) + len(ids) >= most:
            talk.events["overlong"] += 1
            talk.finished, talk.reply = False, None
            return
        talk.events["rerendered"] += not as_rendered
        talk.takes(ids, [nan] * len(ids), own=False)
        talk.messages += answers

    # ---- what answers it ----

    def by_tools(self, talks: Sequence[Talk]) -> list[Messages]:
        """The calls of all conversations together."""
        calls = [(talk, call) for talk in talks for call in _reply(talk).calls]
        said: dict[int, str] = {}
        for i, (_, call) in enumerate(calls):
            tool = self.tools.get(call.name)
            wrong = f"there is no tool {call.name!r}" if tool is None else tool.complaint(call.arguments)
            if wrong is not None:
                said[i] = f"error: {wrong}"
        sound = [i for i in range(len(calls)) if i not in said]
        outcomes = self.bench.run([(calls[i][1].name, calls[i][1].arguments) for i in sound])
        for i, (talk, _) in enumerate(calls):
            talk.events["calls"] += 1
            talk.events["failures"] += i in said
        for i, outcome in zip(sound, outcomes, strict=True):
            said[i] = self._words(calls[i][0], outcome)
        found = {id(talk): [] for talk in talks}
        for i, (talk, call) in enumerate(calls):
            found[id(talk)].append({"role": "tool", "name": self._inert(call.name), "content": self._inert(said[i])})
        return [found[id(talk)] + self._corrections(talk) for talk in talks]

    def _words(self, talk: Talk, outcome: Outcome) -> str:
        """Of an outcome, for the model; and what it is counted as."""
        talk.events["failures"] += outcome.status not in ("ok", "nothing")
        talk.events["timeouts"] += outcome.status == "timeout"
        talk.events["truncated"] += outcome.truncated
        if outcome.status == "timeout":
            return f"error: it took more than {self.bench.limits.seconds:g} seconds"
        if outcome.status == "died":
            return "error: its process ended without an answer"
        left = outcome.bytes - len(outcome.text.encode())
        text = outcome.text + (CUT.format(left=left, all=outcome.bytes) if left > 0 else "")
        return f"error: {text}" if outcome.status == "error" else text

    def _corrections(self, talk: Talk) -> Messages:
        wrong = _reply(talk).wrong
        talk.events["calls"] += len(wrong)
        talk.events["failures"] += len(wrong)
        talk.events["malformed"] += len(wrong)
        role = {"role": self.frame.corrector} | ({"name": "error"} if self.frame.corrector == "tool" else {})
        return [{**role, "content": self._inert(f"error: {each}")} for each in wrong]

    def by_user(self, talks: Sequence[Talk], turn: int, seed: int) -> list[Messages]:
        if not talks:
            return []
        assert self.user is not None
        keys = [talk.key_of(-turn) for talk in talks]
        said = self.user([talk.history for talk in talks], [talk.prompt.columns for talk in talks], keys, seed)
        for talk, text in zip(talks, said, strict=True):
            talk.events["user_turns"] += bool(text)
            talk.events["speechless"] += text == ""
        return [[{"role": "user", "content": self._inert(text)}] if text else [] for text in said]

    def _inert(self, text: str) -> str:
        """What is no word of the policy's: a page that was searched must not end a turn, or speak as the user."""
        return inert(text, self.frame.tokenizer)

    def answer(self, talks: Sequence[Talk], turn: int, sampling: Sampling) -> list[Talk]:
        """Answers all that wait for it; returns those that go on."""
        waiting = [talk for talk in talks if talk.reply is not None]
        asking = [talk for talk in waiting if not talk.finished]
        speaking = [talk for talk in waiting if talk.finished]
        pairs = [*zip(asking, self.by_tools(asking), strict=True)]
        pairs += zip(speaking, self.by_user(speaking, turn, sampling.seed), strict=True)
        for talk, answers in pairs:
            if answers:
                self.told(talk, answers, sampling.max_completion_length)
            else:
                talk.reply = None
        return [talk for talk in waiting if talk.reply is not None]


def _reply(talk: Talk) -> Reply:
    assert talk.reply is not None
    return talk.reply


@dataclass(frozen=True)
class Conversing:
    """A `Sampler` of conversations, from one of turns."""

    single: Sampler
    turns: Turns
    prompts: Sequence[Prompt]

    @property
    def reproducible(self) -> bool:
        """What tools and users say is theirs."""
        return False

    def update(self, model: Any) -> None:
        self.single.update(model)

    def __call__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int = 1,
        keys: Sequence[int] | None = None,
    ) -> list[Completion]:
        keys, most = range(len(prompt_ids)) if keys is None else keys, sampling.max_completion_length
        first = self.single(prompt_ids, sampling, num_generations, keys)
        pairs = zip(self.prompts, keys, strict=True)
        talks = [Talk(prompt, key, j) for prompt, key in pairs for j in range(num_generations)]
        for talk, said in zip(talks, first, strict=True):
            self.turns.heard(talk, said, most)
        turn = 1
        while live := self.turns.answer(talks, turn, sampling):
            for batch in batches(live, most):
                new = replace(sampling, max_completion_length=most - min(len(talk.ids) for talk in batch))
                found = self.single([talk.context for talk in batch], new, 1, [talk.key_of(turn) for talk in batch])
                for talk, said in zip(batch, found, strict=True):
                    self.turns.heard(talk, said, most)
            turn += 1
        return [talk.completion(any(said.logp for said in first)) for talk in talks]
