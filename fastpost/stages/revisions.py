"""Answers that a model corrects by principles: answer -> critique -> revision, and again on what came of it.

The principle of a turn is drawn for each prompt, from the seed. A conversation that would outgrow the model's positions
stops there, with the revision that it has, and is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain as flat
from statistics import mean
from typing import Any

from fastpost.data import Prompt
from fastpost.data.chat import rendered
from fastpost.stages.asking import Asker
from fastpost.stages.conversation import followed
from fastpost.stages.groups import Answer
from fastpost.stages.jury import Jury
from fastpost.stages.principles import Principle, drawn


@dataclass(frozen=True)
class Step:
    """A turn of a chain."""

    principle: str
    critique: str
    revision: Answer


@dataclass(frozen=True)
class Chain:
    """A prompt, the first answer to it, and what was made of that."""

    prompt: Prompt
    first: Answer
    steps: list[Step] = field(default_factory=list)
    outgrown: bool = False  # it stopped for want of positions

    @property
    def answers(self) -> list[Answer]:
        return [self.first, *(step.revision for step in self.steps)]

    @property
    def row(self) -> dict[str, Any]:
        """For SFT, which reads prompt and completion; the rest is for who wants to see how it came about."""
        steps = [{"principle": s.principle, "critique": s.critique, "revision": s.revision.text} for s in self.steps]
        last = self.answers[-1].text.strip()
        row = {"prompt": self.prompt.prompt, "completion": self.prompt.answered(last), **rendered(self.prompt.columns)}
        return row | {"first": self.first.text, "steps": steps}


def revised(
    asker: Asker, prompts: Sequence[Prompt], principles: Sequence[Principle], revisions: int, name: str
) -> list[Chain]:
    """Chains of so many revisions, one a prompt of the set of this name."""
    first = asker.answers(dict(enumerate(prompts)), f"{name}, answer")
    chains = {key: Chain(prompt, first[key]) for key, prompt in enumerate(prompts)}
    for turn in range(revisions):
        going = {key: chain for key, chain in chains.items() if not chain.outgrown}
        chains |= _revised_once(asker, going, principles, f"{name}, {turn}")
    return list(chains.values())


def _revised_once(
    asker: Asker, chains: Mapping[int, Chain], principles: Sequence[Principle], turn: str
) -> dict[int, Chain]:
    """Every chain with a revision more, where there is room for it."""
    tokenizer = asker.policy.tokenizer
    chosen = {key: drawn(principles, asker.config.seed, f"{turn}, principle", key) for key in chains}
    asked = {
        key: followed(chain.prompt, chain.answers[-1].text, chosen[key].critique, tokenizer)
        for key, chain in chains.items()
    }
    asked = {key: prompt for key, prompt in asked.items() if asker.fits(prompt)}
    critiques = asker.answers(asked, f"{turn}, critique")
    again = {k: followed(asked[k], critiques[k].text, chosen[k].revise, tokenizer) for k in asked}
    again = {key: prompt for key, prompt in again.items() if asker.fits(prompt)}
    revisions = asker.answers(again, f"{turn}, revision")
    return {
        key: replace(chain, steps=[*chain.steps, Step(chosen[key].name, critiques[key].text, revisions[key])])
        if key in revisions
        else replace(chain, outgrown=True)
        for key, chain in chains.items()
    }


def measured(chains: Sequence[Chain], jury: Jury, tokenizer: Any) -> list[Chain]:
    """With what the jury thinks of every answer, to the question that was asked first."""
    prompts = [chain.prompt for chain in chains for _ in chain.answers]
    answers = list(flat.from_iterable(chain.answers for chain in chains))
    ids = [tokenizer(answer.text, add_special_tokens=False).input_ids for answer in answers]
    marked = iter(jury.judged(prompts, answers, ids))
    return [
        replace(chain, first=next(marked), steps=[replace(step, revision=next(marked)) for step in chain.steps])
        for chain in chains
    ]


def report(chains: Sequence[Chain], refuses: Callable[[str], bool]) -> list[dict[str, Any]]:
    """A line for the first answers and for each revision."""
    lines = []
    for turn in range(max(len(chain.answers) for chain in chains)):
        there = [chain.answers[: turn + 1] for chain in chains if len(chain.answers) > turn]
        now = [answers[-1] for answers in there]
        rewards = [answer.reward for answer in now if answer.reward is not None]
        changed = [answers[-1].text.strip() != answers[-2].text.strip() for answers in there] if turn else []
        lines.append(
            {
                "revision": turn,
                "answers": len(now),
                "reward": mean(rewards) if rewards else None,
                "refused": mean(float(refuses(answer.text)) for answer in now),
                "changed": mean(changed) if changed else None,
                "tokens": mean(answer.tokens for answer in now),
                "cut off": mean(float(not answer.finished) for answer in now),
            }
        )
    return lines
