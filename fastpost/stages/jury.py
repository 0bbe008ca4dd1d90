"""Who judges: reward functions, verifiers, reward models, all by one signature (`fastpost.rewards`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fastpost.data import Prompt
from fastpost.rewards import Reward, load_rewards, score
from fastpost.stages.groups import Answer
from fastpost.trainers.config import Rewarded


@dataclass(frozen=True)
class Jury:
    """Reward functions and their weights; None: 1 each."""

    rewards: Sequence[Reward]
    weights: Sequence[float] | None = None
    timeout: float | None = None  # seconds that a function may take for a batch

    @staticmethod
    def of(config: Rewarded) -> Jury:
        return Jury(load_rewards(config.reward), config.reward_weights, config.reward_timeout)

    def judged(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], completion_ids: Sequence[Sequence[int]]
    ) -> list[Answer]:
        """The answers with their rewards, one to each prompt."""
        names = sorted({name for prompt in prompts for name in prompt.columns})
        scores = score(
            self.rewards,
            self.weights,
            [prompt.prompt for prompt in prompts],
            [answer.to(prompt) for prompt, answer in zip(prompts, answers, strict=True)],
            completion_ids,
            {name: [prompt.columns.get(name) for prompt in prompts] for name in names},
            timeout=self.timeout,
        )
        total, each = _numbers(scores.rewards), {name: _numbers(x) for name, x in scores.by_function.items()}
        return [
            replace(answer, reward=total[i], rewards={name: values[i] for name, values in each.items()})
            for i, answer in enumerate(answers)
        ]


def _numbers(values: Tensor) -> list[float | None]:
    """JSON has no NaN, which says here that no function applied."""
    return [None if value != value else value for value in values.tolist()]
