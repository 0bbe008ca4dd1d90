"""Steps and ranks: the same rows a step for any number of ranks, as many packs for each, nearly equal work."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import fastpost as fp
from fastpost.packing import Example, Pack, cost, deal, pack, placeholder, plan, steps
from test_packing_fit import lognormal

WIDTH = 4096


def work(packs: list[Pack], lengths: list[int]) -> float:
    return sum(cost([lengths[row] for row in pack], WIDTH) for pack in packs)


def rows_of(packs: list[Pack]) -> list[int]:
    return sorted(row for pack in packs for row in pack)


def test_an_epoch_has_every_pack_once_in_an_order_of_its_own():
    packs = plan(lognormal(400, 20, 0.8, 100), 128)
    epochs = [steps(packs, 8, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (10, 0))]
    assert epochs[0] == steps(packs, 8, 0, 0)
    for i, epoch in enumerate(epochs):
        assert sorted(pack for step in epoch for pack in step) == sorted(packs)
        assert {len(step) for step in epoch[:-1]} == {8} and 0 < len(epoch[-1]) <= 8
        assert all(epoch != other for other in epochs[:i])
    with pytest.raises(ValueError, match="packs_per_step must be at least 1, got 0"):
        steps(packs, 0, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_workers_sees_the_same_packs(workers):
    packs = plan(lognormal(60, 20, 0.8, 100), 128)
    loaded = DataLoader(range(60), batch_sampler=packs, num_workers=workers, collate_fn=list)  # pyright: ignore
    assert list(loaded) == packs


@pytest.mark.parametrize("unit", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_rank_has_as_many_packs_and_together_they_have_the_rows(ranks, unit):
    rng = random.Random(ranks)
    for _ in range(50):
        lengths = [rng.randint(1, 60) for _ in range(unit * rng.randint(1, 40))]
        packs = plan(lengths, 256, unit)
        shares = deal(packs, lengths, ranks, WIDTH, unit)
        assert len(shares) == ranks and len({len(share) for share in shares}) == 1
        assert len(shares[0]) == -(-len(packs) // ranks)
        dealt = [pack for share in shares for pack in share]
        assert rows_of(dealt) == rows_of(packs) == list(range(len(lengths)))
        for rows in dealt:
            assert sum(lengths[row] for row in rows) <= 256
            assert [row // unit * unit + i for row in rows[::unit] for i in range(unit)] == rows
        # A pack is empty only where every other is a single unit: nothing was left to split.
        assert [] not in dealt or max(map(len, dealt)) == unit
        assert shares == deal(packs, lengths, ranks, WIDTH, unit)


def test_a_pack_that_is_split_leaves_two_of_nearly_the_same_work():
    lengths = [50, 20, 20, 10]
    assert sorted(deal([[0, 1, 2, 3]], lengths, 2, WIDTH)) == [[[0]], [[1, 2, 3]]]


def test_a_rank_without_rows_packs_a_placeholder():
    examples = [Example([5, 6, 7], [False, True, True]), Example([8, 9], [False, True])]
    lengths = [len(example.input_ids) for example in examples]
    shares = deal(plan(lengths, 16), lengths, 4, WIDTH)
    packs = [pack([examples[i] for i in rows] or placeholder()) for share in shares for rows in share]
    assert sorted(packed.num_tokens for packed in packs) == [1, 1, 2, 3]


@pytest.mark.parametrize(
    ("loss", "unit", "fields"),
    [
        (fp.losses.sft, 1, {}),
        (fp.losses.grpo, 4, {"advantage": torch.ones(4), "old_logp": torch.zeros(4)}),
        (fp.losses.dpo, 2, {"ref_logp": torch.zeros(2)}),
    ],
    ids=["sft", "grpo", "dpo"],
)
def test_a_placeholder_has_gradients_and_they_are_zero(loss, unit, fields):
    packed = pack(placeholder(unit), **fields)
    hidden, weight = torch.ones(unit, 3, requires_grad=True), torch.ones(10, 3, requires_grad=True)
    found = fp.fused_loss(loss, hidden, fp.Head(weight), packed.batch)
    found.backward()
    assert packed.num_tokens == unit and found == 0
    assert all(x.grad is not None and not x.grad.any() for x in (hidden, weight))


def test_work_differs_by_no_more_than_packs_of_a_round_do():
    """Say a rank is behind another by x before a round of costs from `low` to `high`. It gets the costlier pack of the
    two, so after it they differ by at most x, or by at most high - low the other way."""
    lengths = lognormal(4000, 5000, 1.2, 131072)
    for ranks in (2, 8, 32):
        for step in steps(plan(lengths, 131072), 64, 0, 0)[:4]:
            shares = deal(step, lengths, ranks, WIDTH)
            rounds = [[work([pack], lengths) for pack in turn] for turn in zip(*shares, strict=True)]
            loads = [work(share, lengths) for share in shares]
            apart = max(max(costs) - min(costs) for costs in rounds)
            assert max(loads) - min(loads) <= apart * (1 + 1e-12)
            assert all(min(a) >= max(b) for a, b in itertools.pairwise(rounds))  # rounds are alike


def test_long_rows_are_balanced_where_dealing_in_order_is_not():
    lengths = lognormal(8000, 5000, 1.2, 131072)
    dealt, in_order = [], []
    for step in steps(plan(lengths, 131072), 64, 0, 0):
        loads = [work(share, lengths) for share in deal(step, lengths, 8, WIDTH)]
        naive = [work(step[rank::8], lengths) for rank in range(8)]
        dealt.append(max(loads) / statistics.mean(loads))
        in_order.append(max(naive) / statistics.mean(naive))
    # The costliest rank's lead over the mean is at least halved in every step, and tenfold less on average.
    assert all(a - 1 < (b - 1) / 2 for a, b in zip(dealt[:-1], in_order[:-1], strict=True))
    assert statistics.mean(dealt) - 1 < (statistics.mean(in_order) - 1) / 10


def test_cost_is_what_a_layer_computes():
    """The flop of a layer's products, counted by torch; of the attention's, a causal mask leaves half."""
    D, n = 24, 40
    x, square, wide = torch.ones(n, D), torch.ones(D, D), torch.ones(D, 4 * D)
    with FlopCounterMode(display=False) as matrices:
        q, k, v = (x @ square for _ in range(3))
        (x @ square @ wide) @ wide.T
    with FlopCounterMode(display=False) as attention:
        (q @ k.T) @ v
    tokens = (matrices.get_total_flops() + attention.get_total_flops() / 2) / (24 * D * D)
    assert cost([n], D) == pytest.approx(tokens)
    assert cost([n, n, 7], D) == pytest.approx(2 * tokens + cost([7], D))


def test_bad_input_is_named():
    for name, numbers in (("ranks", (0, 8, 1)), ("width", (2, 0, 1)), ("unit", (2, 8, 0))):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            deal([[0]], [3], *numbers)
    for strange in ([0, 5], [-1]):
        with pytest.raises(ValueError, match=rf"row numbers from 0 to 2, as there are lengths, got \[{strange[0]}"):
            deal([strange], [3, 4, 5], 2, 8)
    for torn in ([0, 1, 2], [1], [0, 2]):
        with pytest.raises(ValueError, match="whole units, of 2 adjacent rows each, got"):
            deal([torn], [3, 4, 5], 2, 8, unit=2)
