"""What does not fit is refused at the door, by a ValueError that names the argument and what would be right."""

from __future__ import annotations

import math
import re

import pytest
import torch

import fastpost as fp

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


@pytest.mark.parametrize("logp", [[[float("nan"), -1.0]], [[0.0, 0.0]]], ids=["NaN", "two certainties"])
def test_a_teacher_whose_numbers_are_no_log_probabilities_is_refused(logp):
    teacher = fp.TopK(torch.tensor([[0, 1]]), torch.tensor(logp))
    with pytest.raises(ValueError, match=r"TopK.logp must be log-probabilities"):
        fp.token_stats(
            torch.randn(1, 4), torch.randn(5, 4), torch.tensor([1]), outputs=("forward_kl",), reference=teacher
        )


@pytest.mark.parametrize("messages", [DOOR, HEADS, TEACHERS])
def test_the_messages_asked_for_above_are_patterns_that_can_fail(messages):
    for row in messages.values():
        assert not re.search(row[-1], "an unrelated complaint about nothing")
