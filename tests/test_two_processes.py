"""Two processes under DistributedDataParallel: the gradient is that of one process with everything in one batch.

Each rank takes an optimizer window of two microbatches, without synchronisation on the first. The ranks have unequal
numbers of valid tokens, or one has none at all. `fastpost.weights` divides by the count over all ranks and the whole
window, times the number of ranks, because DDP averages. The mean over each rank's own tokens is another gradient.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fastpost as fp
from fastpost import weights
from fastpost.packing import Example, Packed, pack
from problems import in_dtype
from ranks import RANKS, two_processes
from rules import assert_gradient_close_to_truth

pytest.importorskip("transformers")

import tiny

pytestmark = pytest.mark.slow

LOSSES = {"sft": {}, "dpo": {"beta": 0.5}, "grpo": {"epsilon": 0.3, "beta": 0.04}}
HEADS = ("trained", "tied", "frozen")
SHARES = ("few", "none")  # of the valid tokens, for the second rank
DTYPES = ("float64", "float32")
WAYS = ("fused", "logits", "local mean")
Gradients = dict[str, Tensor]

# (prompt, completion) lengths of each sequence, by rank and microbatch; two sequences are a pair.
LENGTHS = (
    (((3, 9), (3, 7), (2, 5), (4, 8)), ((2, 6), (2, 11), (1, 4), (5, 3))),
    (((6, 1), (6, 2)), ((3, 1), (3, 1))),
)
NEAR_UNIFORM = 0.2  # times the head: log-probabilities stay near that of a uniform guess, and ratios near 1


# ---- the data ----


@dataclass(frozen=True)
class Row:
    example: Example
    old_logp: list[float]
    ref_logp: list[float]
    advantage: float


def rows(rank: int, microbatch: int, share: str) -> list[Row]:
    """The same ones in whatever process asks."""
    random = torch.Generator().manual_seed(10 * rank + microbatch)
    near = lambda n: (0.2 * torch.randn(n, generator=random) - 4.6).tolist()  # noqa: E731
    made = []
    for prompt, completion in LENGTHS[rank][microbatch]:
        valid = completion if share == "few" or rank == 0 else 0
        ids = torch.randint(5, tiny.SHAPE["vocab_size"], (prompt + completion,), generator=random).tolist()
        example = Example(ids, [False] * (len(ids) - valid) + [True] * valid)
        made.append(Row(example, near(valid), near(valid), float(torch.randn((), generator=random))))
    return made


def all_rows(share: str) -> list[Row]:
    """Of both ranks, the whole window."""
    return [row for rank in range(RANKS) for microbatch in range(2) for row in rows(rank, microbatch, share)]


def packed(chosen: list[Row]) -> Packed:
    return pack(
        [row.example for row in chosen],
        old_logp=[row.old_logp for row in chosen],
        ref_logp=[row.ref_logp for row in chosen],
        advantage=torch.tensor([row.advantage for row in chosen]),
    )


def weighed(packs: list[Packed], loss: str) -> list[Packed]:
    """Every microbatch of this rank with its share of the whole step."""
    step = weights.Window.of(*(one.batch for one in packs)).over_ranks()
    of = weights.token_mean if loss == "sft" else weights.sequence_mean
    weigh = lambda batch: replace(batch, weight=of(batch, step, getattr(fp.losses, loss).unit))  # noqa: E731
    return [replace(one, batch=weigh(one.batch)) for one in packs]


def weighed_by_hand(one: Packed, loss: str) -> Packed:
    """The same, written out for one process and one batch: 1 / N, 1 / P, 1 / (S n)."""
    batch, n = one.batch, one.batch.kept_lengths
    each = {
        "sft": torch.full_like(batch.target, int(n.sum())),
        "dpo": torch.full((len(n) // 2,), len(n) // 2),
        "grpo": len(n) * batch.spread(n.clamp(min=1)),
    }
    return replace(one, batch=replace(batch, weight=1 / each[loss]))


# ---- one window ----


def policy(head: str, dtype: str) -> torch.nn.Module:
    model = tiny.model(tie_word_embeddings=head == "tied")
    with torch.no_grad():
        model.lm_head.weight.mul_(NEAR_UNIFORM)
    model.lm_head.requires_grad_(head != "frozen")
    return model.to(getattr(torch, dtype))


def objective(wrapped: torch.nn.Module, model: torch.nn.Module, one: Packed, loss: str, way: str) -> Tensor:
    """The weighted loss of a pack, through the forward of the wrapped model."""
    equation, knobs = getattr(fp.losses, loss), LOSSES[loss]
    dtype = next(model.parameters()).dtype
    batch = in_dtype(one.batch, dtype)
    inputs = {"input_ids": one.input_ids, "position_ids": one.position_ids, "use_cache": False}
    if way == "logits":
        logits = wrapped(**inputs).logits[0]
        logp = logits.log_softmax(-1).gather(-1, batch.target.clamp(min=0)[:, None])[:, 0]
        return (equation(fp.Stats(logp=logp), batch, **knobs) * batch.weight).sum()
    hidden = wrapped(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
    return fp.fused_loss(equation, hidden, fp.Head.of(model), batch, **knobs)


def gradients(model: torch.nn.Module) -> Gradients:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def window(rank: int, loss: str, head: str, share: str, dtype: str, way: str) -> Gradients:
    """What an optimizer on this rank would see."""
    model = policy(head, dtype)
    wrapped = DistributedDataParallel(model)
    packs = [packed(rows(rank, microbatch, share)) for microbatch in range(2)]
    if way != "local mean":
        packs = weighed(packs, loss)
    for i, one in enumerate(packs):
        with wrapped.no_sync() if i == 0 else contextlib.nullcontext():
            total = objective(wrapped, model, one, loss, way)
            (total / len(packs) if way == "local mean" else total).backward()
    return gradients(model)


def alone(loss: str, head: str, share: str) -> Gradients:
    """The truth: one process, one batch of everything, logits in memory, float64."""
    model = policy(head, "float64")
    objective(model, model, weighed_by_hand(packed(all_rows(share)), loss), loss, "logits").backward()
    return gradients(model)


def every_window(rank: int) -> dict[tuple[str, ...], Gradients]:
    return {case: window(rank, *case) for case in itertools.product(LOSSES, HEADS, SHARES, DTYPES, WAYS)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, ...], Gradients]]:
    """Every window's gradients, of each rank."""
    return two_processes(every_window, tmp_path_factory.mktemp("ranks"))


def waits_for_ever(rank: int) -> None:
    time.sleep(60)


def raises_on_the_second(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("rank 1 went wrong")
    dist.barrier()


# ---- tests ----


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_one_process(found, loss, head, share):
    truth = alone(loss, head, share)
    of = lambda rank, *case: found[rank][loss, head, share, *case]  # noqa: E731
    for case in itertools.product(DTYPES, ("fused", "logits")):
        first, second = of(0, *case), of(1, *case)
        assert set(first) == set(second) == set(truth)
        assert all(torch.equal(first[name], second[name]) for name in truth), f"the ranks differ: {case}"
    for way in ("fused", "logits"):
        torch.testing.assert_close(of(0, "float64", way), truth)
    for name, want in truth.items():
        assert want.any(), name
        assert_gradient_close_to_truth(of(0, "float32", "fused")[name], of(0, "float32", "logits")[name], want, name)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_over_each_ranks_own_tokens_is_another_gradient(found, loss, share):
    truth, local = alone(loss, "trained", share), found[0][loss, "trained", share, "float64", "local mean"]
    for name, want in truth.items():
        assert (local[name] - want).norm() > 0.05 * want.norm(), name


def test_a_failure_shows_the_traceback_of_its_rank(tmp_path):
    with pytest.raises(mp.ProcessRaisedException, match=r"(?s)in raises_on_the_second.*rank 1 went wrong"):
        two_processes(raises_on_the_second, tmp_path)


def test_a_hang_shows_where(tmp_path):
    with pytest.raises(AssertionError, match="in waits_for_ever"):
        two_processes(waits_for_ever, tmp_path, seconds=1.0)
