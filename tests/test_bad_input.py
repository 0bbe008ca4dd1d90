"""What does not fit is refused at the door, by a ValueError that names the argument and what would be right."""

from __future__ import annotations

import math
import re

import pytest
import torch

import fastpost as fp
from fastpost import losses

T, D, V = 6, 4, 9
META = torch.device("meta")


def refuses(message: str, function, *args, **options) -> None:
    with pytest.raises(ValueError, match=message):
        function(*args, **options)


def arguments(**other: object) -> dict:
    target = torch.randint(0, V, (T,))
    return {"hidden": torch.randn(T, D), "head": torch.randn(V, D), "target": target} | other


def reference(V: int = V, D: int = 3, T: int = T, dtype: torch.dtype = torch.float32) -> tuple:
    return torch.randn(T, D, dtype=dtype), torch.randn(V, D, dtype=dtype)


def teacher(ids: list[int] | None = None, K: int = 2, rows: int = T, **rest: object) -> fp.TopK:
    ids = torch.tensor(ids or [*range(K)]).expand(rows, -1).contiguous()
    return fp.TopK(ids, torch.full(ids.shape, -2.0), **rest)


KL = {"outputs": ("reverse_kl",)}

DOOR = {
    "hidden: a list": ({"hidden": [1.0]}, "hidden must be a floating tensor .*got list"),
    "hidden: integers": (
        {"hidden": torch.ones(T, D, dtype=torch.int64)},
        "hidden must be a floating .*got torch.int64",
    ),
    "hidden: its width": ({"hidden": torch.randn(T, 5)}, r"hidden \(6, 5\) .*weight \(9, 4\) must have one D"),
    "hidden: its dtype": (
        {"hidden": torch.randn(T, D).half()},
        "one dtype outside autocast, got torch.float16 and torch.float32",
    ),
    "head: a module": (
        {"head": torch.nn.Linear(D, V)},
        r"head must be a fastpost.Head .*got Linear; see Head.of\(model\)",
    ),
    "head: a vector": ({"head": torch.randn(V)}, r"head.weight must be a floating \(V, D\) matrix, got .* \(9,\)"),
    "head: its device": ({"head": torch.empty(V, D, device=META)}, "hidden is on cpu and head.weight on meta"),
    "target: a list": ({"target": [1] * T}, "target must be an int64 tensor, got list"),
    "target: its dtype": ({"target": torch.ones(T, dtype=torch.int32)}, "target must be int64, got torch.int32"),
    "target: its shape": (
        {"target": torch.ones(5, dtype=torch.int64)},
        r"hidden \(6, 4\) and target \(5,\) must agree",
    ),
    "target: its device": ({"target": torch.ones(T, dtype=torch.int64, device=META)}, "target on meta"),
    "target: too high": ({"target": torch.tensor([0, 1, 9, 2, 30, -100])}, r"in \[0, 9\), .*got 9 \(2 such targets\)"),
    "target: negative": ({"target": torch.tensor([0, 1, -1, 2, 3, -100])}, r"in \[0, 9\), .*got -1 \(1 such targets\)"),
    "empty": ({"hidden": torch.randn(0, D), "target": torch.ones(0, dtype=torch.int64)}, r"target is empty.*\(0, 4\)"),
    "outputs: a typo": (
        {"outputs": ("entrpy",)},
        r"unknown output 'entrpy' \(did you mean 'entropy'\?\); known: logp, ",
    ),
    "outputs: a string": ({"outputs": "logp"}, r"outputs must be a sequence .*write \('logp',\)"),
    "temperature: zero": ({"temperature": 0}, "temperature must be positive and finite, got 0"),
    "temperature: NaN": ({"temperature": math.nan}, "temperature must be positive and finite, got nan"),
    "temperature: text": ({"temperature": "1"}, "temperature must be .*'1'"),
    "temperature: shape": ({"temperature": torch.ones(3)}, r"target's shape \(6,\), got \(3,\)"),
    "temperature: a bad one": (
        {"temperature": torch.tensor([1.0, 1, 1, 1, 1, -1])},
        "temperature must be positive and finite for",
    ),
    "jsd_beta": ({"jsd_beta": 1.5}, r"jsd_beta must be in \[0, 1\], got 1.5"),
    "no reference": (
        KL,
        r"output 'reverse_kl' compares two distributions: pass reference=\(hidden_q, head_q\) or a .*TopK",
    ),
    "reference: hidden alone": (KL | {"reference": torch.randn(T, D)}, "reference must be .*got Tensor"),
    "reference: its vocabulary": (KL | {"reference": reference(V=8)}, "vocabulary of 8 and the policy's one of 9"),
    "reference: its rows": (
        KL | {"reference": reference(T=5)},
        r"reference's hidden \(5, 3\) and target \(6,\) must agree",
    ),
    "reference: its width": (
        KL | {"reference": (torch.randn(T, 3), torch.randn(V, 2))},
        r"reference's hidden \(6, 3\) .*weight \(9, 2\) must have one D",
    ),
    "reference: its dtype": (
        KL | {"reference": reference(dtype=torch.float64)},
        "torch.float32 .*reference.*torch.float64",
    ),
    "teacher: its rows": (KL | {"reference": teacher(rows=5)}, r"reference TopK \(5, 2\) and target \(6,\) must agree"),
    "teacher: its ids": (KL | {"reference": teacher([0, 9])}, r"TopK.ids must be in \[0, 9\), .*got 9"),
    "teacher: an id twice": (KL | {"reference": teacher([4, 4])}, "TopK.ids must be distinct within a row"),
    "teacher: infinite": (KL | {"reference": teacher(rest="renormalize")}, "infinite .*use rest='bucket'"),
}


@pytest.mark.parametrize("what", DOOR)
def test_token_stats_and_linear_logprobs(what):
    other, message = DOOR[what]
    refuses(message, fp.token_stats, **arguments(**other))
    if "outputs" not in other:
        refuses(message, fp.linear_logprobs, **arguments(**other))


@pytest.mark.parametrize("name", ["entropy", "top1", "lgp"])
def test_differentiates_is_of_what_is_asked_for(name):
    call = arguments(outputs=("logp", "top1"), differentiates=(name,))
    refuses(f"differentiates must be some of outputs, other than top1: got {name!r}", fp.token_stats, **call)


def test_an_ignored_target_may_be_any_number_that_is_said_to_be_ignored():
    call = arguments(target=torch.tensor([0, 1, 77, 2, 77, 3]))
    assert fp.token_stats(**call, ignore_index=77).logp[2] == 0
    refuses(
        r"got -100 \(1 such",
        fp.token_stats,
        **(call | {"target": torch.tensor([0, 1, 77, 2, -100, 3])}),
        ignore_index=77,
    )


HEADS = {
    "bias": ({"bias": torch.randn(8)}, r"head.bias must have shape \(9,\) .*got \(8,\)"),
    "softcap": ({"softcap": 0.0}, "head.softcap must be a positive, finite number, got 0.0"),
    "scale": ({"scale": math.inf}, "head.scale must be a positive, finite number, got inf"),
    "a negative scale": ({"scale": -1.0}, "head.scale must be a positive, finite number, got -1.0"),
}


@pytest.mark.parametrize("what", HEADS)
def test_head(what):
    other, message = HEADS[what]
    refuses(message, fp.Head, torch.randn(V, D), **other)


TEACHERS = {
    "shapes": (
        (torch.ones(3, 2, dtype=torch.int64), torch.randn(3, 1)),
        {},
        r"one shape \(T, K\), .*got \(3, 2\) and \(3, 1\)",
    ),
    "dtype": ((torch.ones(3, 2), torch.randn(3, 2)), {}, "TopK.ids must be int64, got torch.float32"),
    "rest": (
        (torch.ones(3, 2, dtype=torch.int64), torch.randn(3, 2)),
        {"rest": "drop"},
        "TopK.rest must be .*got 'drop'",
    ),
    "no tokens": ((torch.ones(3, 0, dtype=torch.int64), torch.randn(3, 0)), {}, r"TopK.ids .*\(3, 0\)"),
}


@pytest.mark.parametrize("what", TEACHERS)
def test_topk(what):
    tensors, other, message = TEACHERS[what]
    refuses(message, fp.TopK, *tensors, **other)


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
    "kl": ({"kl": torch.zeros(1)}, r"batch.kl must have shape \(\) .*got \(1,\)"),
}


@pytest.mark.parametrize("what", BATCHES)
def test_batch(what):
    other, message = BATCHES[what]
    refuses(message, batch, **other)


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


@pytest.mark.parametrize("messages", [DOOR, HEADS, TEACHERS, BATCHES, LOSSES])
def test_the_messages_asked_for_above_are_patterns_that_can_fail(messages):
    for row in messages.values():
        assert not re.search(row[-1], "an unrelated complaint about nothing")


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


@pytest.mark.parametrize("logp", [[[float("nan"), -1.0]], [[0.0, 0.0]]], ids=["NaN", "two certainties"])
def test_a_teacher_whose_numbers_are_no_log_probabilities_is_refused(logp):
    teacher = fp.TopK(torch.tensor([[0, 1]]), torch.tensor(logp))
    with pytest.raises(ValueError, match=r"TopK.logp must be log-probabilities"):
        fp.token_stats(
            torch.randn(1, 4), torch.randn(5, 4), torch.tensor([1]), outputs=("forward_kl",), reference=teacher
        )
