"""The numbers of every device: losses of each schedule and heads of each kind against float64, over several tiles.

The vocabulary is wider than a tile, so that sums are carried from one launch to the next as in earnest; the corners, at
tiny sizes, are those of tests/test_head.py and its like.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastpost as fp
from fastpost import losses
from fastpost.core import sweep
from fastpost.core.quantised import Quantised, weight_of
from fastpost.types import Shard
from loss_problems import fused
from problems import DIVERGENCES, OWN, Problem, assert_exact, assert_loss_exact, problem, schedules_of

T, D, D_Q = 48, 64, 24
LENGTHS = (20, 4, 24)
POLICY = {"beta": 0.04, "entropy_coef": 0.01}
LOSSES = {
    "sft": (losses.sft, {}),
    "grpo": (losses.grpo, {"beta": 0.04}),
    "grpo with entropy": (losses.grpo, POLICY),
    "gspo with an exact KL": (losses.gspo, POLICY | {"kl_estimator": "exact"}),
    "reverse_kl": (losses.reverse_kl, {}),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def words(device: torch.device) -> int:
    """Of a vocabulary of two tiles, the second odd."""
    return sweep.COLUMNS[device.type] + 809


def drawn(dtype: torch.dtype, device: torch.device, *, train_head: bool, **traits: object) -> Problem:
    """With a reference of another width."""
    V = words(device)
    p = problem(dtype, device, T=T, D=D, V=V, temperature=0.75, **traits)
    hidden, weight = torch.randn(T, D_Q), torch.randn(V, D_Q).mul(3 / D_Q**0.5)
    reference = hidden.to(device, dtype), fp.Head(weight.to(device, dtype))
    return replace(p, reference=reference).to(dtype, train_head=train_head)


def packed(p: Problem, unit: str) -> fp.Batch:
    """Every third token is ignored. Made on the host, and moved."""
    with torch.no_grad():
        logp = fp.token_stats(p.hidden, p.head, p.target, temperature=p.temperature).logp.float().cpu()
    near = [logp + 0.2 * torch.randn(T) for _ in range(2)]
    target = p.target.cpu().where(torch.arange(T) % 3 > 0, -100)
    batch = fp.Batch(target, torch.tensor(LENGTHS), old_logp=near[0], ref_logp=near[1])
    batch = replace(batch, advantage=torch.randn(len(LENGTHS)), weight=torch.rand(batch.units(unit)) + 0.5)
    return batch.to(p.target.device)


@DTYPES
@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_exact(name, train_head, dtype, device):
    loss, knobs = LOSSES[name]
    p = drawn(dtype, device, train_head=train_head)
    batch = packed(p, loss.unit)
    total = fused(loss, p, batch, **knobs)
    frozen = not train_head and loss.bind(**knobs).differentiates == ("logp",)
    assert total.device.type == device.type and schedules_of(total) == {"FrozenLogp" if frozen else "EagerLoss"}
    assert_loss_exact(total, loss, p, batch, name, **knobs)


@DTYPES
def test_every_statistic_is_exact(dtype, device):
    assert_exact(drawn(dtype, device, train_head=True, bias=True), (*OWN, *DIVERGENCES))


# ---- other heads ----


def assert_head_exact(p: Problem) -> None:
    """A loss of logp alone, and one of an entropy and a divergence besides."""
    for name in ("grpo", "gspo with an exact KL"):
        loss, knobs = LOSSES[name]
        batch = packed(p, loss.unit)
        assert_loss_exact(fused(loss, p, batch, **knobs), loss, p, batch, name, **knobs)


@DTYPES
def test_a_lora_beside_a_frozen_weight_is_exact(dtype, device):
    p = drawn(dtype, device, train_head=False, ranks=(4,))
    assert p.leaves.keys() == {"hidden", "a0", "b0"}
    assert_head_exact(p)


@DTYPES
def test_a_head_in_4_bits_is_exact(dtype, device):
    layer = pytest.importorskip("bitsandbytes").nn.Linear4bit(D, words(device), bias=False, quant_type="nf4")
    layer.weight.data = torch.randn(words(device), D).mul(3 / D**0.5)
    weight = weight_of(layer.to(device)).to(dtype)
    assert isinstance(weight, Quantised)
    p = drawn(dtype, device, train_head=False)
    assert_head_exact(replace(p, head=replace(p.head, weight=weight)))


@pytest.fixture
def alone(device: torch.device, tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    backend, meeting = "nccl" if device.type == "cuda" else "gloo", f"file://{tmp_path / 'meeting'}"
    dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@DTYPES
@pytest.mark.parametrize("train_head", [True, False], ids=["trained", "frozen"])
def test_a_sharded_head_of_one_rank_is_exact(train_head, dtype, device, alone):
    p = drawn(dtype, device, train_head=train_head)
    shard, (hidden, head) = Shard((words(device),)), p.reference
    sharded = replace(p, head=replace(p.head, shard=shard), reference=(hidden, replace(head, shard=shard)))
    for name in ("sft", "gspo with an exact KL"):
        loss, knobs = LOSSES[name]
        batch = packed(p, loss.unit)
        assert_loss_exact(fused(loss, sharded, batch, **knobs), loss, p, batch, name, **knobs)
