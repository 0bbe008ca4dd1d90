"""Models -> what they answer and what is thought of it, through one journal a model: OUT/models/NAME/work.jsonl.

The journal of a model knows of no other, so a model that is added later is all that is asked then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastpost.data import Prompt
from fastpost.evaluation.config import Eval
from fastpost.evaluation.divergence import Measured, measured
from fastpost.evaluation.refusal import refuses
from fastpost.rewards import load_reward
from fastpost.stages.asking import asked, read_prompts
from fastpost.stages.groups import Group
from fastpost.stages.journal import Journal, through
from fastpost.stages.jury import Jury
from fastpost.stages.policy import Policy, frozen

REFUSED_ABOVE = 0.5  # by a judge


@dataclass(frozen=True)
class Bench:
    """What all models are held to."""

    rewards: Jury | None
    refusal_judge: Jury | None
    reference: tuple[Any, Any] | None  # a model and its tokenizer

    @staticmethod
    def of(config: Eval) -> Bench:
        rewards, judge = Jury.of(config) if config.dataset else None, config.refusal_judge
        of_refusal = None if judge is None else Jury([load_reward(judge)], None, config.reward_timeout)
        reference = frozen(config, config.reference) if config.dataset and config.reference else None
        return Bench(rewards, of_refusal, reference)


@dataclass(frozen=True)
class Answers:
    """Of one model; lists have an entry a prompt."""

    name: str
    greedy: list[Group] = field(default_factory=list)
    sampled: list[Group] = field(default_factory=list)
    greedy_measured: list[list[Measured]] = field(default_factory=list)  # of each answer
    sampled_measured: list[list[Measured]] = field(default_factory=list)
    refused: list[bool | None] = field(default_factory=list)  # harmful prompts; None: the judge does not say
    over_refused: list[bool | None] = field(default_factory=list)  # benign ones


def answers_of(config: Eval, path: str, name: str, bench: Bench) -> Answers:
    """All of one model; what its journal has is not done again."""
    policy = Policy.of(config, path)
    _check_vocabulary(policy, bench, config)
    work = _Work(
        config, policy, bench, Journal(Path(config.output_dir) / "models" / name / "work.jsonl", config.facts(path))
    )
    found = work.of_dataset(Answers(name)) if config.dataset else Answers(name)
    if config.harmful_dataset is not None:
        found = replace(found, refused=work.refusals(config.harmful_dataset, "harmful"))
    if config.benign_dataset is not None:
        found = replace(found, over_refused=work.refusals(config.benign_dataset, "benign"))
    return found


@dataclass(frozen=True)
class _Work:
    """One model at work."""

    config: Eval
    policy: Policy
    bench: Bench
    journal: Journal

    def of_dataset(self, found: Answers) -> Answers:
        """Greedy answers and samples, judged and measured."""
        prompts = read_prompts(self.config, self.policy.tokenizer)
        n, jury = self.config.num_generations, self.bench.rewards
        greedy = self._asked(self._greedy(), prompts, 1, "greedy", jury)
        found = replace(
            found,
            greedy=greedy,
            greedy_measured=self._measured(prompts, greedy, 1.0, "greedy"),
        )
        if not n:
            return found
        sampled = self._asked(self.policy, prompts, n, f"sampled-{n}", jury)
        of_samples = self._measured(prompts, sampled, self.config.temperature, f"sampled-{n}")
        return replace(found, sampled=sampled, sampled_measured=of_samples)

    def refusals(self, path: str, turn: str) -> list[bool | None]:
        """Whether the greedy answer to each prompt refuses."""
        prompts, judge = read_prompts(self.config, self.policy.tokenizer, path), self.bench.refusal_judge
        groups = self._asked(self._greedy(), prompts, 1, turn, judge)
        if judge is None:
            return [refuses(group.answers[0].last) for group in groups]
        rewards = [group.answers[0].reward for group in groups]
        return [None if reward is None else reward > REFUSED_ABOVE for reward in rewards]

    def _greedy(self) -> Policy:
        return replace(self.policy, sampling=replace(self.policy.sampling, temperature=0.0))

    def _asked(self, policy: Policy, prompts: list[Prompt], n: int, turn: str, jury: Jury | None) -> list[Group]:
        size = self.config.generation_batch_size
        return list(asked(policy, prompts, n, self.journal, size, jury=jury, turn=turn, keep_ids=True))

    def _measured(
        self, prompts: list[Prompt], groups: list[Group], temperature: float, turn: str
    ) -> list[list[Measured]]:
        def measure(of: Sequence[int]) -> list[Any]:
            answers = [answer for i in of for answer in groups[i].answers]
            asked_for = [prompts[i].input_ids for i in of for _ in groups[i].answers]
            said, own = [answer.ids or [] for answer in answers], [answer.own for answer in answers]
            model, precision = self.policy.model, self.policy.precision
            reference = None if self.bench.reference is None else self.bench.reference[0]
            each = iter(measured(model, reference, asked_for, said, temperature, precision, own))
            return [[asdict(next(each)) for _ in groups[i].answers] for i in of]

        size = max(1, self.config.generation_batch_size // len(groups[0].answers))
        lines = through(self.journal, f"measured-{turn}", len(prompts), size, measure)
        return [[Measured(**one) for one in line] for line in lines]


def _check_vocabulary(policy: Policy, bench: Bench, config: Eval) -> None:
    if bench.reference is not None and bench.reference[1].get_vocab() != policy.tokenizer.get_vocab():
        raise ValueError(f"reference {config.reference!r} has another vocabulary than the model: there is no KL to it")
