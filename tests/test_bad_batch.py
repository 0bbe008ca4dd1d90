"""A batch that does not fit, and a loss that asks for what is not there, are refused by a ValueError that names it."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch

import fastpost as fp
from fastpost import losses
from test_bad_input import D, T, V, refuses


def batch(**other: object) -> fp.Batch:
    given = {"target": torch.randint(0, V, (T,)), "lengths": torch.tensor([4, 2])} | other
    return fp.Batch(**given)


BATCHES = {
    "target: two dimensions": (
        {"target": torch.ones(2, 3, dtype=torch.int64)},
        r"batch.target must be flat, .*\(2, 3\)",
    ),
    "target: its dtype": ({"target": torch.ones(T)}, "batch.target must be int64, got torch.float32"),
    "lengths: their sum": (
        {"lengths": torch.tensor([4, 3])},
        "sum to the 6 positions of batch.target, got 2 lengths summing to 7",
    ),
    "lengths: negative": ({"lengths": torch.tensor([8, -2])}, "batch.lengths must be non-negative"),
    "lengths: none": ({"lengths": torch.ones(0, dtype=torch.int64)}, "batch.lengths must be .*got 0 lengths"),
    "lengths: floating": ({"lengths": torch.tensor([4.0, 2.0])}, "batch.lengths must be a flat integer tensor"),
    "old_logp": (
        {"old_logp": torch.zeros(5)},
        r"batch.old_logp must have shape \(6,\) .*6 positions in 2 sequences, got \(5,\)",
    ),
    "advantage": ({"advantage": torch.zeros(3)}, r"batch.advantage must have shape \(6,\) .*got \(3,\)"),
    "label": ({"label": torch.zeros(T, dtype=torch.bool)}, r"batch.label must have shape \(2,\) .*got \(6,\)"),
    "margin": ({"margin": torch.zeros(2)}, r"batch.margin must have shape \(1,\) .*got \(2,\)"),
    "probability": ({"probability": torch.zeros(2)}, r"batch.probability must have shape \(1,\) .*got \(2,\)"),
    "kl": ({"kl": torch.zeros(1)}, r"batch.kl must have shape \(\) .*got \(1,\)"),
}


@pytest.mark.parametrize("what", BATCHES)
def test_batch(what):
    other, message = BATCHES[what]
    refuses(message, batch, **other)


# Of each field that must be where the target is, a shape that fits.
FIELDS = {"advantage": (2,), "label": (2,), "completion_length": (2,), "margin": (1,), "kl": (), "weight": (1,)}
FIELDS |= {"probability": (1,)}
FIELDS |= dict.fromkeys(("old_logp", "ref_logp", "rollout_logp", "old_value", "return_"), (T,)) | {"kept": (3,)}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_on_another_device_than_the_target(name):
    field = torch.empty(FIELDS[name], device="meta", dtype=torch.bool if name == "label" else None)
    refuses(f"batch.{name} is on meta and batch.target on cpu: batch.to moves all of it", batch, **{name: field})


def test_no_field_is_forgotten():
    assert {field.name for field in fields(fp.Batch)} == FIELDS.keys() | {"target", "lengths", "kept_lengths"}


def test_lengths_and_a_scalar_may_be_on_the_host():
    target, lengths = torch.empty(T, device="meta", dtype=torch.int64), torch.tensor([4, 2])
    assert fp.Batch(target, lengths, kl=torch.tensor(0.5)).counts.device == target.device


def undeclared(stats: fp.Stats, batch: fp.Batch) -> torch.Tensor:
    return -stats.logp


@fp.loss(unit="token")
def forgetful(stats: fp.Stats, batch: fp.Batch) -> torch.Tensor:
    """Looks at a statistic that it has not declared."""
    return -stats.entropy


ONE = torch.tensor([T])
LOSSES = {
    "not a loss": ((undeclared, batch()), {}, "loss must be declared with fastpost.loss"),
    "not a batch": ((losses.sft, torch.ones(T)), {}, "batch must be a fastpost.Batch, got Tensor"),
    "a knob": (
        (losses.grpo, batch()),
        {"epsilon_hi": 1},
        r"'grpo' has no knob 'epsilon_hi' \(did you mean 'epsilon_high'\?\)",
    ),
    "a knob of none": (
        (losses.sft, batch()),
        {"beta": 1},
        "'sft' has no knob 'beta'; its knobs: label_smoothing, z_loss",
    ),
    "a knob's range": ((losses.dpo, batch(ref_logp=torch.zeros(T))), {"label_smoothing": 0.5}, r"\[0, 0.5\), got 0.5"),
    "a clip's range": ((losses.grpo, batch(advantage=torch.zeros(2))), {"epsilon": -1}, "epsilon .*got -1"),
    "a field": ((losses.dpo, batch()), {}, "the loss 'dpo' needs batch.ref_logp, which is None"),
    "a field again": ((losses.gspo, batch()), {}, "the loss 'gspo' needs batch.advantage, which is None"),
    "a field for beta": (
        (losses.grpo, batch(advantage=torch.zeros(2))),
        {"beta": 0.1},
        "the loss 'grpo' needs batch.ref_logp, which is None",
    ),
    "a statistic": ((forgetful, batch()), {}, "the loss 'forgetful' needs stats.entropy, which is None"),
    "pairs of three": (
        (losses.dpo, batch(lengths=torch.tensor([2, 2, 2]))),
        {},
        "a pair is two adjacent .*has 3 sequences",
    ),
    "weight": (
        (losses.dpo, batch(weight=torch.ones(T))),
        {},
        r"batch.weight must have shape \(1,\), one for each pair, got \(6,\)",
    ),
    "the wrong T": (
        (losses.sft, batch(target=torch.ones(5, dtype=torch.int64), lengths=torch.tensor([5]))),
        {},
        r"\(6, 4\).*\(5,\)",
    ),
    "an output": ((losses.sft, batch()), {"outputs": ("kl",)}, "unknown output 'kl'"),
    "no reference": ((losses.sft, batch()), {"outputs": ("jsd",)}, "output 'jsd' compares two distributions"),
}


@pytest.mark.parametrize("what", LOSSES)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_fused_loss(trained, what):
    (loss, data), knobs, message = LOSSES[what]
    hidden, weight = torch.randn(T, D, requires_grad=True), torch.randn(V, D, requires_grad=trained)
    refuses(message, fp.fused_loss, loss, hidden, weight, data, **knobs)


def test_a_loss_called_directly_says_the_same():
    stats = fp.Stats(logp=-torch.ones(T))
    refuses("the loss 'dpo' needs batch.ref_logp, which is None", losses.dpo, stats, batch())
    refuses("the loss 'sft' needs stats.logp, which is None", losses.sft, fp.Stats(), batch())
    refuses(r"'dpo' has no knob 'bta' \(did you mean 'beta'\?\)", losses.dpo, stats, batch(), bta=1)
    refuses(
        r"stats.logp must have shape \(6,\) to match batch.target, got \(5,\)",
        losses.sft,
        fp.Stats(logp=torch.ones(5)),
        batch(),
    )


def test_nothing_is_half_done_when_a_call_is_refused():
    hidden, weight = torch.randn(T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    data, state, precision = batch(), torch.get_rng_state(), torch.get_float32_matmul_precision()
    refuses("needs batch.ref_logp", fp.fused_loss, losses.dpo, hidden, weight, data)
    assert hidden.grad is None and weight.grad is None
    assert torch.equal(torch.get_rng_state(), state) and torch.get_float32_matmul_precision() == precision


def test_a_loss_of_tokens_is_refused_what_belongs_to_sequences():
    @fp.loss(unit="token")
    def longer(stats: fp.Stats, batch: fp.Batch) -> torch.Tensor:
        return -stats.logp / batch.spread(batch.counts)

    batch = fp.Batch(torch.tensor([1, 2, 3]), torch.tensor([1, 2]))
    with pytest.raises(
        ValueError, match=r"'longer' is one of tokens and asks for batch.counts: declare unit='sequence'"
    ):
        fp.fused_loss(longer, torch.randn(3, 4), torch.randn(5, 4), batch)


def test_a_loss_that_returns_another_shape_is_refused():
    @fp.loss(unit="sequence")
    def reduced(stats: fp.Stats, batch: fp.Batch) -> torch.Tensor:
        return stats.logp.mean()

    batch = fp.Batch(torch.tensor([1, 2, 3]), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"'reduced' must return one number for each sequence, \(2,\), got \(\)"):
        fp.fused_loss(reduced, torch.randn(3, 4), torch.randn(5, 4), batch)


@pytest.mark.parametrize("messages", [BATCHES, LOSSES])
def test_the_messages_asked_for_above_are_patterns_that_can_fail(messages):
    for row in messages.values():
        assert not re.search(row[-1], "an unrelated complaint about nothing")
