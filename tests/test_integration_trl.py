"""TRL's trainers with and without fastpost's head.

Two runs are the same when they differ by what TRL differs from itself under other chunks of the vocabulary: the losses
of the steps, all that is logged, and the weights at the end may be 10 times that far apart. Where TRL has no chunks,
float64 is the judge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

from fastpost.integrations import trl as on_fastpost
from rules import assert_close_to_truth, assert_gradient_close_to_truth
from trl_trainers import ATTENTION, ON_HEAD, Run, calls_of_the_head, experts, soft_capped, train, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore")
CHUNKS = (7, 32)  # of a vocabulary of 97; TRL's own is 32768


def runs(name: str, out: Path, monkeypatch: pytest.MonkeyPatch, saved: Any, **changes: Any) -> tuple[Run, ...]:
    """On fastpost, on TRL, and on TRL with other chunks of the vocabulary."""
    called = calls_of_the_head(monkeypatch)
    with on_fastpost.patch():
        ours = train(trainer_of(name, out, saved, **changes))
    assert set(called) == {"fused_loss" if name == "distillation" else "token_stats"}
    called.clear()
    theirs = train(trainer_of(name, out, saved, **changes))
    others = []
    for chunk in CHUNKS:
        monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", chunk)
        monkeypatch.setattr("trl.kernels.chunked_divergence.VOCAB_CHUNK_SIZE", chunk)
        others.append(train(trainer_of(name, out, saved, **changes)))
    assert not called
    return ours, theirs, *others


def assert_same(ours: Run, theirs: Run, *others: Run) -> None:
    for what in ("losses", "logs", "weights"):
        got, want, *again = (getattr(run, what) for run in (ours, theirs, *others))
        error, yardstick = (got - want).norm(), max((want - other).norm() for other in again)
        assert yardstick > 0, f"{what}: TRL under other chunks is the same to the bit, so nothing is measured"
        assert error <= 10 * yardstick, f"{what}: {error:.2e} apart, and TRL from itself {yardstick:.2e}"


# More than one iteration, for with one the ratio is 1 whatever the log-probabilities are.
OFF_POLICY = {"num_iterations": 2}
RUNS = {
    "sft": ("sft", {}),
    "dpo": ("dpo", {}),
    "kto": ("kto", {}),
    "grpo": ("grpo", OFF_POLICY),
    "rloo": ("rloo", OFF_POLICY),
    "distillation": ("distillation", {}),
}


@pytest.mark.parametrize("run", RUNS)
def test_twenty_steps_are_the_same(run, tmp_path, monkeypatch, saved):
    name, changes = RUNS[run]
    assert_same(*runs(name, tmp_path, monkeypatch, saved, **changes))


OPTIONS = {
    "sft accumulating and evaluating": ("sft", {"gradient_accumulation_steps": 3, "evaluates": True}),
    "sft dft": ("sft", {"loss_type": "dft"}),
    "sft padding-free": ("sft", {"padding_free": True, "max_length": None}),
    "sft lora": ("sft", {"lora": ATTENTION}),
    "dpo precomputed, evaluating": ("dpo", {"precompute_ref_log_probs": True, "evaluates": True}),
    "dpo ipo": ("dpo", {"loss_type": ["ipo"]}),
    "dpo aot": ("dpo", {"loss_type": ["aot"]}),
    "dpo weighted": ("dpo", {"use_weighting": True, "gradient_accumulation_steps": 2}),
    "dpo lora": ("dpo", {"lora": ATTENTION}),
    "kto apo": ("kto", {"loss_type": "apo_zero_unpaired", "evaluates": True}),
    "grpo kl and entropy": ("grpo", {"beta": 0.1, "entropy_coef": 0.02, "temperature": 0.7, **OFF_POLICY}),
    "grpo fp32 head": ("grpo", {"beta": 0.1, "cast_lm_head_to_fp32": True, "top_entropy_quantile": 0.5, **OFF_POLICY}),
    "grpo lora, evaluating": ("grpo", {"lora": ATTENTION, "beta": 0.1, "evaluates": True, **OFF_POLICY}),
    "rloo lora": ("rloo", {"lora": ATTENTION, **OFF_POLICY}),
    "distillation forward": ("distillation", {"beta": 0.0, "temperature": 2.0}),
    "distillation mixed": ("distillation", {"beta": 0.3, "gradient_accumulation_steps": 2}),
    "distillation lora": ("distillation", {"lora": ATTENTION, "evaluates": True}),
}


@pytest.mark.parametrize("name", ["sft", "grpo"])
@pytest.mark.parametrize("make", [experts, soft_capped])
def test_other_families(name, make, tmp_path, monkeypatch):
    changes = OFF_POLICY if name == "grpo" else {}
    assert_same(*runs(name, tmp_path, monkeypatch, make, max_steps=6, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("run", OPTIONS)
def test_options_change_nothing(run, tmp_path, monkeypatch, saved):
    name, changes = OPTIONS[run]
    assert_same(*runs(name, tmp_path, monkeypatch, saved, **{"max_steps": 6} | changes))


WITHOUT_CHUNKS = {
    "cpo": ("cpo", None, {"evaluates": True}),
    "cpo simpo": ("cpo", None, {"loss_type": "simpo", "cpo_alpha": 0.0, "gradient_accumulation_steps": 2}),
    "cpo lora": ("cpo", None, {"lora": ATTENTION}),
    "cpo lora on the head": ("cpo", None, {"lora": ON_HEAD}),
    "orpo lora on the head": ("orpo", None, {"lora": ON_HEAD}),
    "orpo": ("orpo", None, {"evaluates": True}),
    "orpo experts": ("orpo", experts, {}),
}


@pytest.mark.parametrize("run", WITHOUT_CHUNKS)
def test_cpo_and_orpo_are_as_exact_as_trl(run, tmp_path, monkeypatch, saved):
    name, make, changes = WITHOUT_CHUNKS[run]

    def trained(dtype: torch.dtype = torch.float32) -> Run:
        model = saved if make is None else lambda: make().to(dtype)
        return train(trainer_of(name, tmp_path, model, dtype=dtype, **{"max_steps": 6} | changes))

    called = calls_of_the_head(monkeypatch)
    with on_fastpost.patch():
        ours = trained()
    assert set(called) == {"token_stats"}
    called.clear()
    theirs, truth = trained(), trained(torch.float64)
    assert not called
    assert_close_to_truth(ours.losses, theirs.losses, truth.losses, "losses")
    assert_close_to_truth(ours.logs, theirs.logs, truth.logs, "logs")
    assert_gradient_close_to_truth(ours.weights, theirs.weights, truth.weights, "weights")
