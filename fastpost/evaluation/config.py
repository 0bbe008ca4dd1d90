"""What `fastpost eval` is told."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

from fastpost.evaluation.intervals import Confidence
from fastpost.stages.config import Judging
from fastpost.trainers.config import DATA, MODEL, ROLLOUT, RUN, Conversing
from fastpost.trainers.options import option

FREE = {  # they decide nothing of what a model says, nor of what is thought of one answer
    *("output_dir", "generation_batch_size", "reward_timeout", "num_generations", "pairs_dataset"),
    *("pass_k", "right_above", "answer", "confidence", "bootstrap_resamples", "calibration_bins"),
    *("judge", "pairs_reward"),
}


@dataclass(frozen=True, kw_only=True)
class Eval(Judging, Conversing):
    """How good models are, how sure that is, and which of them is better."""

    # Several are asked in the same way, each by its path.
    model: tuple[str, ...] = option(  # pyright: ignore[reportIncompatibleVariableOverride]
        (), MODEL, "directories (or hub names) of models or adapters; several are compared, prompt by prompt"
    )
    reference: str | None = option(None, MODEL, "the model that KL is measured to, along the sampled answers")

    dataset: str = option("", DATA, "prompts, with the columns that the reward needs: accuracy, pass@k, diversity ...")
    harmful_dataset: str | None = option(None, DATA, "prompts that should be refused: the refusal rate")
    benign_dataset: str | None = option(None, DATA, "prompts that should not be: the over-refusal rate")
    pairs_dataset: str | None = option(None, DATA, "pairs of answers: how often each reward prefers the chosen one")

    reward: tuple[str, ...] = option(
        (), ROLLOUT, "as the trainers have it; the first says whether an answer is right; repeatable"
    )
    num_generations: int = option(8, ROLLOUT, "samples a prompt, beside the greedy answer; 0: none", least=0)
    right_above: float = option(0.5, ROLLOUT, "an answer is right whose first reward is above this")
    answer: str = option(
        "auto",
        ROLLOUT,
        "what votes in maj@k: number (the last), choice, boxed, text, file.py:function; auto: by the reward",
    )
    pairs_reward: tuple[str, ...] = option((), ROLLOUT, "rewards that pairs are shown to; default: reward; repeatable")
    judge: str | None = option(
        None, ROLLOUT, "who decides which answer wins, a reward or judge.yaml; default: the rewards"
    )
    refusal_judge: str | None = option(None, ROLLOUT, "reward above 0.5 where an answer refuses; default: phrases")

    pass_k: tuple[int, ...] = option((), RUN, "k of pass@k and maj@k; default: powers of 2, and all samples", above=0)
    confidence: float = option(0.95, RUN, "of the intervals", above=0, most=0.9999)
    bootstrap_resamples: int = option(2000, RUN, "of the prompts, for intervals of means", least=100)
    calibration_bins: int = option(10, RUN, "of equal width", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)

    @property
    def ks(self) -> list[int]:
        """Of pass@k and maj@k."""
        powers = takewhile(lambda k: k < self.num_generations, (2**i for i in range(32)))
        return sorted(set(self.pass_k)) or [*powers, *([self.num_generations] if self.num_generations else [])]

    @property
    def intervals(self) -> Confidence:
        return Confidence(self.confidence, self.bootstrap_resamples, self.seed)

    @property
    def names(self) -> list[str]:
        """Of the models: their directories' names, or their paths where two have one name."""
        last = [_last(path) for path in self.model]
        return last if len(set(last)) == len(last) else [path.strip("/").replace("/", "_") for path in self.model]

    def facts(self, model: str) -> dict[str, Any]:
        """What decides the answers of one model and what is thought of each: another model beside it does not."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FREE}
        return given | {"model": model}


def _last(path: str) -> str:
    """What a directory is called, `.` and `..` by where they are."""
    name = Path(path).name
    return name if name not in ("", "..") else Path(path).resolve().name


def _check(config: Eval) -> None:
    """What does not go together."""
    prompts = {
        name: getattr(config, name)
        for name in ("dataset", "harmful_dataset", "benign_dataset")
        if getattr(config, name)
    }
    if not prompts and config.pairs_dataset is None:
        raise ValueError("dataset, harmful_dataset, benign_dataset or pairs_dataset must be given: what to evaluate on")
    if prompts and not config.model:
        raise ValueError(f"model must be given, one or more: who is asked the prompts of {next(iter(prompts))}")
    if len(set(config.names)) < len(config.model):
        raise ValueError(f"model must hold each model once, got {' '.join(config.model)}")
    if config.dataset and not config.reward:
        raise ValueError("reward must be given: what judges the answers of dataset")
    if config.pairs_dataset is not None and not (config.pairs_reward or config.reward):
        raise ValueError("pairs_reward, or reward, must be given: what is shown the pairs of pairs_dataset")
    if config.temperature == 0 and config.num_generations:
        raise ValueError(
            "temperature must be above 0 for samples, got 0: or set num_generations 0, greedy answers alone"
        )
    if config.pass_k and max(config.pass_k) > config.num_generations:
        raise ValueError(f"pass_k must be at most num_generations, {config.num_generations}, got {max(config.pass_k)}")
