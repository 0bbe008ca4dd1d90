"""Normalisations: by their definitions in float64, whatever the cut into microbatches and processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastpost import weights
from fastpost.packing import Example, pack
from fastpost.types import Batch
from fastpost.weights import Window

COUNTS = (3, 1, 0, 5, 2, 4)  # kept tokens of each sequence; one completion is empty
L = 8  # max_completion_length
NAMES = {
    "token_mean": weights.token_mean,
    "sequence_mean": weights.sequence_mean,
    "fixed_length": lambda batch, window=None, unit="token": weights.fixed_length(batch, L, window, unit),
    "total": weights.total,
}
UNITS = ("token", "sequence", "pair", "batch")
each = pytest.mark.parametrize(("name", "weigh"), NAMES.items(), ids=NAMES.keys())


def batch_of(counts: tuple[int, ...] = COUNTS, host: bool = True) -> Batch:
    """Prompts of two tokens. Without `host` the batch does not know what is kept, as one of raw tensors."""
    batch = pack([Example([7] * (2 + n), [False] * 2 + [True] * n) for n in counts]).batch
    return batch if host else Batch(batch.target, batch.lengths)


def definition(name: str, unit: str, counts: tuple[int, ...] = COUNTS) -> list[float]:
    """What the kept units of one process and one batch weigh."""
    S, N = len(counts), sum(counts)
    token = {
        "token_mean": [1 / N] * S,
        "sequence_mean": [1 / (S * n) if n else 0.0 for n in counts],
        "fixed_length": [1 / (S * L)] * S,
    }
    if name == "total":
        return [1.0] * {"token": N, "sequence": S, "pair": S // 2, "batch": 1}[unit]
    if unit == "token":
        return [w for w, n in zip(token[name], counts, strict=True) for _ in range(n)]
    whole = [1 / S] * S if name == "sequence_mean" else [w * n for w, n in zip(token[name], counts, strict=True)]
    return {
        "sequence": whole,
        "pair": [a + b for a, b in zip(whole[::2], whole[1::2], strict=True)],
        "batch": [sum(whole)],
    }[unit]


def of_kept(weight: Tensor, batch: Batch, unit: str) -> Tensor:
    return weight[batch.target != -100] if unit == "token" else weight


@each
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("host", [True, False])
def test_a_weight_is_its_definition(name: str, weigh, unit: str, host: bool):
    batch = batch_of(host=host)
    got = weigh(batch, unit=unit)
    assert got.shape == (batch.units(unit),) and got.dtype == torch.float32
    torch.testing.assert_close(of_kept(got, batch, unit), torch.tensor(definition(name, unit)))
    assert got.isfinite().all()


@each
@pytest.mark.parametrize("unit", UNITS[:3])
@pytest.mark.parametrize("cut", [(2, 4), (2, 2, 2), (6,)])
def test_microbatches_of_a_window_sum_to_the_whole(name: str, weigh, unit: str, cut: tuple[int, ...]):
    """sum weight * loss over the parts is that over the whole batch, for any loss of the units."""
    window = Window.of(batch_of())
    loss = torch.rand(batch_of().units(unit) if unit != "token" else sum(COUNTS))  # nothing cancels
    whole = of_kept(weigh(batch_of(), unit=unit), batch_of(), unit) @ loss
    total, start, units = 0.0, 0, 0
    for n in cut:
        part = batch_of(COUNTS[start : start + n])
        weight = of_kept(weigh(part, window, unit=unit), part, unit)
        total += float(weight @ loss[units : units + len(weight)])
        start, units = start + n, units + len(weight)
    assert total == pytest.approx(float(whole))


@each
@pytest.mark.parametrize("unit", UNITS[:3])
def test_averaging_over_processes_of_unequal_size_gives_the_whole(name: str, weigh, unit: str):
    """DDP averages gradients: with W in the numerator the average over processes is the sum over all of them."""
    window = replace(Window.of(batch_of()), world_size=2)
    parts = batch_of(COUNTS[:2]), batch_of(COUNTS[2:])
    averaged = torch.cat([of_kept(weigh(part, window, unit=unit), part, unit) / 2 for part in parts])
    torch.testing.assert_close(averaged, of_kept(weigh(batch_of(), unit=unit), batch_of(), unit))


@pytest.mark.parametrize("unit", UNITS)
def test_a_mean_of_ones_is_one(unit: str):
    """Over units, and for tokens over kept ones; an empty sequence is one of the sequences, with nothing to say."""
    batch = batch_of()
    assert float(of_kept(weights.token_mean(batch, unit=unit), batch, unit).sum()) == pytest.approx(1)
    empty = 1 / 6 if unit == "token" else 0
    got = float(of_kept(weights.sequence_mean(batch, unit=unit), batch, unit).sum())
    assert got == pytest.approx(1 - empty)


def test_what_is_skipped_keeps_its_place_in_the_denominator():
    """Half of the completions have no gradient and are not in the batch; each token still weighs 1 / N of all."""
    window = Window(tokens=sum(COUNTS), sequences=len(COUNTS))
    part = batch_of((3, 5))
    assert weights.token_mean(part, window).eq(torch.tensor(1 / 15)).all()
    assert weights.sequence_mean(part, window, "sequence").eq(torch.tensor(1 / 6)).all()
    assert weights.fixed_length(part, L, window).eq(torch.tensor(1 / 48)).all()


def test_the_mean_of_microbatch_means():
    cut = [batch_of((3, 1)), batch_of((5,))]
    got = [weights.microbatch_mean(part, 2) for part in cut]
    assert got[0].eq(1 / 8).all() and got[1].eq(1 / 10).all()
    assert weights.microbatch_mean(cut[0], 2, "pair").tolist() == [0.5]
    assert not torch.equal(got[0], weights.token_mean(cut[0], Window.of(*cut)))


@pytest.mark.parametrize("unit", ["sequence", "pair"])
def test_a_loss_that_is_a_sum_over_tokens_has_the_mean_over_all_of_them(unit: str):
    loss, batch = torch.randn(len(COUNTS), dtype=torch.float64), batch_of()
    sums = (loss * torch.tensor(COUNTS)).float().view(batch.units(unit), -1).sum(1)
    means = loss.float() if unit == "sequence" else sums / torch.tensor(COUNTS).view(3, 2).sum(1)
    got = weights.token_mean_of_sums(batch, unit=unit) @ sums
    torch.testing.assert_close(got, weights.token_mean(batch, unit=unit) @ means)
    window = Window(tokens=30, sequences=12, world_size=2)
    assert weights.token_mean_of_sums(batch, window, unit).eq(torch.tensor(2 / 30)).all()


def test_a_method_finds_its_normalisation_by_name():
    names = {"dapo": "token_mean", "grpo": "sequence_mean", "dr_grpo": "fixed_length", "bnpo": "microbatch_mean"}
    names["vespo"] = "token_mean_of_sums"
    assert all(getattr(weights, method) is getattr(weights, name) for method, name in names.items())


@pytest.mark.parametrize("unit", UNITS)
def test_nothing_kept_is_no_division_by_zero(unit: str):
    batch = batch_of((0, 0))
    for weigh in (*NAMES.values(), weights.microbatch_mean):
        assert weigh(batch, unit=unit).isfinite().all()


def test_a_window_adds_up_its_microbatches():
    window = Window.of(batch_of((3, 1)), batch_of((0, 5, 2), host=False))
    assert (int(window.tokens), window.sequences, window.world_size) == (11, 5, 1)
    assert window.over_ranks() is window


def test_counts_reduced_on_a_device_are_used_as_they_are():
    window = Window(torch.tensor(20), torch.tensor(10), world_size=4)
    assert weights.token_mean(batch_of(), window).eq(torch.tensor(4 / 20)).all()
    assert weights.sequence_mean(batch_of(), window, "pair").eq(torch.tensor(4 * 2 / 10)).all()


def test_the_counts_of_two_processes(monkeypatch: pytest.MonkeyPatch):
    """all_reduce is played by one that adds another process's counts."""
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda counts: counts.add_(torch.tensor([5, 2])))
    window = Window.of(batch_of()).over_ranks()
    assert (int(window.tokens), int(window.sequences), window.world_size) == (20, 8, 2)
    assert weights.token_mean(batch_of(), window).eq(torch.tensor(2 / 20)).all()


def over_two_ranks(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    window = Window.of(batch_of(((3, 1), (0, 5, 2))[rank])).over_ranks()
    assert (int(window.tokens), int(window.sequences), window.world_size) == (11, 5, 2)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_counts_of_two_real_processes(tmp_path: Path):
    torch.multiprocessing.spawn(over_two_ranks, (str(tmp_path / "store"),), nprocs=2)


def test_weights_travel_in_the_batch():
    """fused_loss, with the weight left out, takes the mean over kept tokens: the same number."""
    from fastpost import Head, fused_loss, losses

    batch, hidden, weight = batch_of(), torch.randn(27, 8), torch.randn(50, 8)
    plain = fused_loss(losses.sft, hidden, Head(weight), batch)
    ours = fused_loss(losses.sft, hidden, Head(weight), replace(batch, weight=weights.token_mean(batch)))
    torch.testing.assert_close(ours, plain)


BAD = [
    (lambda b: Window(-1, 2), "window.tokens must not be negative, got -1"),
    (lambda b: Window(1, 2, 0), "window.world_size must be at least 1, got 0"),
    (lambda b: Window(torch.ones(3), 2), r"window.tokens must be one number, got a tensor of shape \(3,\)"),
    (lambda b: Window.of(), "batches must be one microbatch or more, got none"),
    (lambda b: weights.fixed_length(b, 0), "max_completion_length must be at least 1, got 0"),
    (lambda b: weights.microbatch_mean(b, 0), "microbatches must be at least 1, got 0"),
    (lambda b: weights.token_mean(batch_of((1, 2, 3)), unit="pair"), "adjacent sequences.*the batch has 3 sequences"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(batch_of())
