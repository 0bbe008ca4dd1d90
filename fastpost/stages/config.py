"""What every stage is told that asks a policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastpost.stages.hints import fields_of
from fastpost.trainers.config import DATA, ROLLOUT, RUN, STEPS, Conversing, Engined, Loaded, Rewarded, Sft
from fastpost.trainers.options import REQUIRED, option, read_fields


@dataclass(frozen=True, kw_only=True)
class Asking(Loaded, Engined):
    """A policy, prompts, and how it is asked."""

    dataset: str = option("", DATA, ".jsonl, .json or .parquet file, or a directory saved by datasets", needed=True)
    max_prompt_length: int | None = option(None, DATA, "tokens; rows with a longer prompt are left out", above=0)
    temperature: float = option(1.0, ROLLOUT, "of sampling; 0: the likeliest token", least=0)
    output_dir: str = option(REQUIRED, RUN, "receives what was made; the same command again goes on from what is there")
    seed: int = option(42, RUN, "of everything random", least=0)

    def __post_init__(self) -> None:
        read_fields(self)
        self.backend  # noqa: B018  # what does not go together is refused there


@dataclass(frozen=True, kw_only=True)
class Judging(Asking, Rewarded):
    """And how its answers are judged."""


@dataclass(frozen=True, kw_only=True)
class BestOfN(Judging, Conversing):
    """The best of N answers to each prompt, by any reward: a data set, and the score against N."""

    num_generations: int = option(16, ROLLOUT, "N, answers to a prompt", above=0)


@dataclass(frozen=True, kw_only=True)
class Rejection(Sft, Judging, Conversing):
    """Rounds of sampling, selection by reward, and SFT on what was selected (RAFT, STaR, ReST)."""

    dataset: str = option("", DATA, "prompts, and the columns that the rewards read", needed=True)
    eval_dataset: str | None = option(
        None, DATA, "the same, held out; greedy answers are judged before the first round and after each"
    )
    num_generations: int = option(4, ROLLOUT, "answers to a prompt, in each round", above=0)
    select: Literal["best", "top_k", "threshold"] = option(
        "best", ROLLOUT, "what is trained on: of each prompt the best answer, the best select_top, or all that reach"
        " select_threshold"
    )  # fmt: skip
    select_top: int = option(2, ROLLOUT, "top_k: answers of a prompt", above=0)
    select_threshold: float | None = option(None, ROLLOUT, "reward below which an answer is never trained on")
    deduplicate: bool = option(True, ROLLOUT, "of answers with the same text, to the same prompt, train on one")
    hint: str | None = option(
        None,
        ROLLOUT,
        "asks again where nothing reached select_threshold, by a template of the prompt and of columns, "
        "'{prompt}The answer is {answer}.'; what comes of it is trained on without the hint (STaR)",
    )
    rounds: int = option(3, STEPS, "of sampling and SFT; the fields of SFT are those of each round", above=0)
    train_from: Literal["base", "last"] = option(
        "base", STEPS, "what a round trains: the model it all began with (STaR, ReST-EM), or the last round's (RAFT)"
    )
    resume_from_checkpoint: str | None = option(
        None, RUN, "nothing, or 'latest', which is the same: this command always goes on from what is there"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.backend  # noqa: B018  # what does not go together is refused there
        if self.select == "threshold" and self.select_threshold is None:
            raise ValueError("select threshold keeps what reaches select_threshold: give that as well")
        if self.hint is not None:
            fields_of(self.hint)
            if self.select_threshold is None:
                raise ValueError("hint is for prompts where nothing reached select_threshold: give that as well")
        if self.resume_from_checkpoint not in (None, "latest"):
            raise ValueError(
                f"resume_from_checkpoint must be left out, or 'latest', got {self.resume_from_checkpoint!r}: rejection "
                "goes on from what is in output_dir"
            )
        if self.metric_for_best_model is not None:
            raise ValueError(
                "metric_for_best_model is of evaluations within a run, and a round of rejection has one after it: "
                "leave it out; eval_dataset gives the score of each round's model"
            )

    @property
    def selected_at_most(self) -> int | None:
        """Answers of a prompt; None: all that are good enough."""
        return {"best": 1, "top_k": self.select_top, "threshold": None}[self.select]


@dataclass(frozen=True, kw_only=True)
class Stepwise(Judging):
    """Answers that go step by step."""

    step_separator: str = option("\n", DATA, "text between steps; \\n: a new line")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "step_separator", self.step_separator.replace("\\n", "\n"))
        if not self.step_separator:
            raise ValueError("step_separator must be a text, a new line say, got an empty one")


@dataclass(frozen=True, kw_only=True)
class PrmLabel(Stepwise):
    """Steps of a policy's solutions, each labelled by whether it can still be completed. arXiv:2312.08935"""

    num_generations: int = option(4, ROLLOUT, "solutions of a prompt", above=0)
    num_completions: int = option(8, ROLLOUT, "K, completions from each step", above=0)
    right_above: float = option(0.5, ROLLOUT, "a solution is right if its reward is above this")
    labels: Literal["hard", "soft"] = option(
        "hard", DATA, "hard: whether one of the completions is right; soft: what share of them"
    )


@dataclass(frozen=True, kw_only=True)
class Guided(Stepwise):
    """Beam search, step by step, by a reward of the answer so far: a process reward model. arXiv:2408.03314"""

    num_beams: int = option(4, ROLLOUT, "B, answers that are kept at each step", above=0)
    num_expansions: int = option(4, ROLLOUT, "M, next steps of each; the cost is that of the best of B x M", above=0)
    max_completion_length: int = option(128, ROLLOUT, "tokens of a step", above=0)
    max_solution_steps: int = option(32, ROLLOUT, "steps, after which the best so far is taken", above=0)


@dataclass(frozen=True, kw_only=True)
class Constitution(Judging):
    """Constitutional AI: answers revised by principles, or compared by them. arXiv:2212.08073"""

    constitution: str = option(REQUIRED, DATA, "YAML file: a list of principles, a sentence each")
    phase: Literal["revise", "prefer"] = option(REQUIRED, ROLLOUT, "answers that are revised, or pairs that are judged")
    revisions: int = option(1, ROLLOUT, "revise: of each answer, by a principle each", above=0)
    num_generations: int = option(2, ROLLOUT, "prefer: answers to a prompt, two and two a pair", least=2)
    judge: str | None = option(None, ROLLOUT, "prefer: YAML file of a judge; default: the model itself")
    confidence: float = option(
        0.5, ROLLOUT, "prefer: pairs whose better answer is less probable than this are left out", least=0.5, most=1
    )
    benign_dataset: str | None = option(
        None, DATA, "revise: prompts that nothing is wrong with, to see whether revisions refuse them"
    )
    reward: tuple[str, ...] = option((), ROLLOUT, "what measures the answers, for the report alone; repeatable")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations % 2:
            raise ValueError(f"num_generations must be even, for pairs, got {self.num_generations}")
