"""Of the verb that learns from a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastpost.trainers.config.drawn import Drawn
from fastpost.trainers.config.groups import DATA, LOSS, MODEL, ROLLOUT, STEPS
from fastpost.trainers.config.training import Training
from fastpost.trainers.options import option

KNOBS = {"beta": ("gkd",), "alpha": ("kd",)}  # the losses that have them


@dataclass(frozen=True, kw_only=True)
class Distill(Training, Drawn):
    """Learning what a teacher would say, in the data's answers, its own or the student's (GKD). arXiv:2306.13649"""

    teacher_model: str | None = option(
        None, MODEL, "directory of the teacher: a model of the same vocabulary, or an adapter, also of the model's base"
    )
    teacher_cache: str | None = option(
        None, MODEL, "directory with what the teacher said of the data set; made by teacher_model where it is not there"
    )
    teacher_top_k: int = option(64, MODEL, "of the cache: the likeliest tokens in each place; 8 bytes each", above=0)
    teacher_rest: Literal["bucket", "renormalize"] = option(
        "bucket", MODEL, "of the cache: what the other tokens are, one outcome more, or impossible"
    )
    disable_dropout: bool = option(False, MODEL, "of the student; that of its adapters stays")
    max_length: int | None = option(1024, DATA, "tokens of a prompt and its completion; cut at the end", above=1)
    max_prompt_length: int | None = option(
        None, DATA, "tokens; of rows that are prompts alone, those with a longer one are left out", above=0
    )

    lmbda: float = option(
        1.0,
        ROLLOUT,
        "share of the steps that are about the student's own answers, which the others are not",
        most=1,
        least=0,
    )
    seq_kd: bool = option(False, ROLLOUT, "the other steps are about the teacher's answers, not about the data's")
    temperature: float = option(1.0, ROLLOUT, "of sampling, and of both distributions that are compared", above=0)

    loss_type: Literal["gkd", "forward_kl", "reverse_kl", "kd"] = option(
        "gkd", LOSS, "kd is the forward KL with SFT's cross entropy; gkd goes from one KL to the other by beta"
    )
    beta: float = option(1.0, LOSS, "of gkd: 0 the forward KL, 1 the reverse KL, else a JSD", least=0, most=1)
    alpha: float = option(0.5, LOSS, "of kd: the share of the cross entropy", least=0, most=1)
    learning_rate: float = option(1e-6, STEPS, "peak of the schedule", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, losses in KNOBS.items():
            if self.loss_type not in losses and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"loss_type {self.loss_type} has no {name}: leave it out, or take {losses[0]}")
        if self.teacher_cache is not None:
            self._check_cached()
        if self.teacher_model is not None and _same(self.teacher_model, self.model):
            raise ValueError(f"teacher_model {self.teacher_model!r} is the model itself: there is nothing to learn")

    @property
    def samples(self) -> bool:
        """Whether some steps are about answers that are sampled."""
        return self.lmbda > 0 or self.seq_kd

    def _check_cached(self) -> None:
        if self.samples:
            raise ValueError(
                "teacher_cache has what the teacher said of the data's answers, not of sampled ones: give lmbda 0, and "
                f"no seq_kd; got lmbda {self.lmbda:g}" + (" and seq_kd" if self.seq_kd else "")
            )
        reverse = self.loss_type == "reverse_kl" or (self.loss_type == "gkd" and self.beta == 1)
        if reverse and self.teacher_rest == "renormalize":
            raise ValueError(
                "the reverse KL to a renormalised teacher is infinite, as it gives the other tokens nothing: give "
                "teacher_rest bucket, beta below 1, or loss_type forward_kl"
            )


def _same(one: str, other: str) -> bool:
    return bool(other) and Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
