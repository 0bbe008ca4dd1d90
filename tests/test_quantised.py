"""Heads of bitsandbytes: their rows are those of the layer, their products exact, and no copy of them is made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import bitsandbytes

import fastpost as fp
from fastpost import losses
from fastpost.core.quantised import Nested, Quantised, weight_of
from problems import (
    DIVERGENCES,
    OWN,
    Problem,
    adapter,
    assert_exact,
    assert_loss_exact,
    ours,
    schedules_of,
    small_tiles,
)
from problems import problem as dense_problem
from test_workspace import MB, WORKSPACE, bytes_of, peak

EVERY = (*OWN, *DIVERGENCES)
MANY = 64  # rows, enough that torch's error, the yardstick, is no stroke of luck
V, D = 200, 64
KINDS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4 twice": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": True},
    "int8": None,
}


def layer(
    kind: str,
    dtype: torch.dtype = torch.float32,
    *,
    shape: tuple[int, int] = (V, D),
    blocksize: int = 64,
    **rest: object,  # of Linear4bit
) -> nn.Linear:
    """One of bitsandbytes, quantised from a weight of this dtype whose logits have a standard deviation of 3."""
    words, width = shape
    if kind == "int8":
        made = bitsandbytes.nn.Linear8bitLt(width, words, bias=False, has_fp16_weights=False)
    else:
        made = bitsandbytes.nn.Linear4bit(width, words, bias=False, **KINDS[kind], **rest)
        made.weight.blocksize = blocksize
    weight = torch.randn(words, width).mul_(3 / width**0.5).to(dtype)
    made.weight.data = weight
    return made.to("cpu").train()  # in eval mode its product rounds the hidden states, too, or its weight is repacked


def dequantised(made: nn.Linear, dtype: torch.dtype) -> Tensor:  # (V, D)
    """What it multiplies with: its product with the identity."""
    return made(torch.eye(made.in_features, dtype=dtype)).T.detach()


# ---- rows ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_layer_bit_for_bit(kind, dtype):
    made = layer(kind, dtype)
    weight, want = weight_of(made).to(dtype), dequantised(made, dtype)
    assert weight.shape == want.shape and weight[:].dtype == dtype
    index = torch.tensor([3, 199, 3, 0])
    assert torch.equal(weight[:], want) and torch.equal(weight[index], want[index])
    assert torch.equal(torch.cat([weight[start : start + 37] for start in range(0, V, 37)]), want)
    assert torch.equal(weight.narrow(0, 0, 90)[:], want[:90])


@pytest.mark.parametrize("kind", ["nf4", "nf4 twice", "fp4"])
@pytest.mark.parametrize("options", [{"blocksize": 32}, {"blocksize": 256}, {"quant_storage": torch.bfloat16}], ids=str)
def test_blocks_and_storage_may_be_any(options, kind):
    made = layer(kind, shape=(53, 768), **options)
    assert torch.equal(weight_of(made).to(torch.float32)[11:40], dequantised(made, torch.float32)[11:40])


def test_a_weight_in_bfloat16_is_read_as_it_was_quantised():
    """Of products in fp32: codes times scales in fp32, not rounded to the dtype that the weight once had."""
    made = layer("nf4", torch.bfloat16)
    weight = weight_of(made).to(torch.float32)[:]
    assert torch.equal(weight, dequantised(made, torch.float32)) and not torch.equal(weight, weight.bfloat16().float())


# ---- against float64 ----


def problem(kind: str, dtype: torch.dtype, **traits: object) -> Problem:
    """A quantised head beside a bias and adapters that train, and a reference on a quantised head of another width."""
    p = dense_problem(dtype, T=MANY, D=D, V=V, **traits)
    q = layer(kind, shape=(V, 128))
    weight, weight_q = (weight_of(made).to(dtype) for made in (layer(kind), q))
    reference = torch.randn(MANY, 128, dtype=dtype), fp.Head(weight_q)
    return replace(p, head=replace(p.head, weight=weight), reference=reference)


TRAITS = {
    "plain": {},
    "all of them": {"bias": True, "softcap": 5.0, "scale": 0.5, "temperature": 0.75, "ranks": (3,)},
}


@pytest.mark.parametrize("tiles", ["one tile", "many tiles"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("traits", TRAITS.values(), ids=TRAITS)
@pytest.mark.parametrize("kind", ["nf4 twice", "int8"])
def test_every_statistic_and_gradient(kind, traits, dtype, tiles, monkeypatch):
    if tiles == "many tiles":
        small_tiles(monkeypatch)
    p = problem(kind, dtype, **traits)
    assert p.leaves.keys() == {"hidden", *({"bias", "a0", "b0"} if traits else ())}
    assert_exact(p, EVERY)


@fp.loss(unit="sequence", reads=("logp", "reverse_kl"))
def distant(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    return torch.log1p(batch.per_sequence(stats.reverse_kl)) - 0.1 * batch.per_sequence(stats.logp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["FrozenLogp", "EagerLoss", "LazyStats"])
@pytest.mark.parametrize("kind", ["nf4 twice", "int8"])
def test_every_schedule_is_exact(kind, schedule, dtype, monkeypatch):
    p = problem(kind, dtype, bias=True, ranks=(3,))
    if schedule == "FrozenLogp":
        p.head.bias.requires_grad_(False)
        p.head.lora[0].b.requires_grad_(False)
    small_tiles(monkeypatch, rows=5 if schedule == "LazyStats" else 40)
    batch = fp.Batch(p.target.index_fill(0, torch.tensor([0, 9]), -100), torch.tensor([20, 14, 30]))
    batch = replace(batch, old_logp=ours(p, ["logp"]).logp.detach().float() + 0.2 * torch.randn(MANY))
    batch = replace(batch, advantage=torch.randn(3), weight=torch.rand(3))
    loss = losses.gspo if schedule == "FrozenLogp" else distant
    given = {} if schedule == "FrozenLogp" else {"reference": p.reference}
    total = fp.fused_loss(loss, p.hidden, p.head, batch, **given)
    assert schedules_of(total) == {schedule}
    assert_loss_exact(total, loss, p, batch)


def test_a_quantised_teacher_of_a_dense_policy():
    p = dense_problem(T=MANY, D=16, V=V)
    assert_exact(replace(p, reference=problem("nf4", torch.float32).reference), DIVERGENCES)


# ---- what cannot be read ----


def repacked() -> nn.Linear:
    made = layer("nf4")
    made.weight.quant_state.packing_format_for_cpu = True
    return made


REFUSED = {
    "no 4 bits yet": (
        lambda: bitsandbytes.nn.Linear4bit(D, V),
        "a Params4bit that is not quantised yet: move the layer",
    ),
    "no 8 bits yet": (
        lambda: bitsandbytes.nn.Linear8bitLt(D, V, has_fp16_weights=False),
        "of torch.float32, not of int8",
    ),
    "trains": (lambda: bitsandbytes.nn.Linear8bitLt(D, V), r"quantised anew at each forward \(has_fp16_weights=True\)"),
    "repacked": (repacked, "repacked the head's 4-bit weight .*support_avx512bf16_for_cpu = False"),
    "across rows": (
        lambda: layer("nf4", blocksize=128),
        r"weight \(200, 64\) has blocks of 128 .*a blocksize that divides 64",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(what):
    make, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        weight_of(make())


def test_a_bare_weight_of_bitsandbytes_says_how_it_is_read():
    with pytest.raises(ValueError, match=r"head\.weight must be a floating .*uint8 .*quantised\.weight_of\(layer\)"):
        fp.Head(layer("nf4").weight)


# ---- memory ----


def large(kind: str, words: int, width: int) -> Quantised:
    """Any codes at all."""
    if kind == "int8":
        return Quantised(torch.randint(-127, 128, (words, width), dtype=torch.int8), torch.rand(words, 1), kind)
    code = lambda count: torch.randint(0, 256, (words, count), dtype=torch.uint8)  # noqa: E731
    absmax = Nested(code(width // 64), torch.rand(256), torch.rand(words * width // 64 // 256), torch.tensor(0.1), 256)
    return Quantised(code(width // 2), absmax, "nf4")


@pytest.mark.parametrize("schedule", ["statistics", "FrozenLogp", "EagerLoss", "LazyStats"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_no_copy_of_the_weight_is_made(kind, schedule):
    """One of bfloat16 alone would be more than the workspace may be."""
    T, words, width = 64, 40_960, 1024
    weight = large(kind, words, width)
    lora = adapter(4, torch.ones(words, width, dtype=torch.bfloat16))
    lora.b.requires_grad_(schedule in ("EagerLoss", "LazyStats"))
    hidden = torch.randn(T, width, dtype=torch.bfloat16).mul_(1e-3).requires_grad_(schedule != "statistics")
    head, batch = fp.Head(weight, lora=(lora,)), fp.Batch(torch.randint(0, words, (T,)), torch.tensor([T]))

    def function() -> None:
        if schedule == "LazyStats":
            total = fp.token_stats(hidden, head, batch.target, outputs=("logp", "entropy")).logp.sum()
        else:
            total = fp.fused_loss(losses.sft, hidden, head, batch)
        assert schedules_of(total) == ({schedule} - {"statistics"})
        if schedule != "statistics":
            total.backward()

    most, allowed = peak(function), WORKSPACE + 3 * bytes_of(lora.b, wide=True)
    assert most <= allowed < words * width * 2, f"{most / MB:.1f} MB"
