"""Packing: which rows share a pack, and where every number lands."""

import json
import random
import re
import warnings
from dataclasses import asdict

import numpy
import pytest
import torch

from fastpost.packing import Example, pack, plan, stream


def test_targets_positions_and_fields_land_where_they_belong():
    a = Example([5, 6, 7, 8], [False, False, True, True])
    b = Example([9], [True])  # one token: nothing to predict
    c = Example([1, 2, 3], [True, True, False])  # the first token is never predicted
    packed = pack([a, b, c], old_logp=[[-0.5, -0.25], [], [-2.0]], advantage=torch.tensor([1.0, 2.0, 3.0]))

    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    assert packed.longest == 4
    assert packed.batch.target.tolist() == [-100, 7, 8, -100, -100, 2, -100, -100]
    assert packed.batch.lengths.tolist() == [4, 1, 3]
    assert packed.batch.kept.tolist() == [1, 2, 5]
    assert packed.batch.old_logp.tolist() == [0, -0.5, -0.25, 0, 0, -2, 0, 0]
    assert packed.batch.advantage.tolist() == [1, 1, 1, 1, 2, 3, 3, 3]


def test_a_pack_with_nothing_to_predict_is_ordinary():
    packed = pack([Example([1], [False]), Example([2, 3], [False, False])])
    assert packed.batch.target.tolist() == [-100, -100, -100]
    assert packed.batch.kept.tolist() == [] and packed.batch.kept.dtype == torch.int64


def test_to_moves_every_tensor():
    packed = pack([Example([1, 2], [False, True])], old_logp=[[-1.0]]).to("meta")
    assert {t.device.type for t in (packed.input_ids, packed.position_ids)} == {"meta"}
    assert packed.batch.target.device.type == packed.batch.old_logp.device.type == "meta"
    assert packed.batch.kept.device.type == "meta" and packed.longest == 2


@pytest.mark.parametrize("unit", [1, 2, 4])
def test_every_row_is_in_one_bin_whole_units_together(unit):
    rng = random.Random(unit)
    lengths = [rng.randint(1, 60) for _ in range(200)]
    bins = plan(lengths, 256, unit)
    assert sorted(row for rows in bins for row in rows) == list(range(200))
    assert all(sum(lengths[row] for row in rows) <= 256 for rows in bins)
    for rows in bins:
        assert all(rows[i : i + unit] == list(range(rows[i], rows[i] + unit)) for i in range(0, len(rows), unit))
    assert bins == plan(lengths, 256, unit)
    # Best fit, longest first, wastes little: never two bins that would fit in one.
    totals = sorted(sum(lengths[row] for row in rows) for rows in bins)
    assert len(totals) == 1 or totals[0] + totals[1] > 256


def test_best_fit_takes_the_fullest_bin_that_has_room():
    assert plan([6, 5, 4, 3, 1], 10) == [[0, 2], [1, 3, 4]]
    assert plan([5, 6, 1, 1], 7) == [[0, 3], [1, 2]]  # 6 leaves 1, 5 leaves 2: the first 1 goes beside the 6
    assert plan([2, 2, 2], 6) == [[0, 1, 2]]
    assert plan([], 4) == []


def test_what_fits_nowhere_is_named():
    with pytest.raises(ValueError, match="row 1 has 9 tokens, more than the 8"):
        plan([3, 9, 2], 8)
    with pytest.raises(ValueError, match=r"rows 2\.\.3, which are never split, have 9 tokens"):
        plan([3, 2, 4, 5], 8, unit=2)
    with pytest.raises(ValueError, match="unit 2 and 3 rows"):
        plan([1, 2, 3], 8, unit=2)


NO_LIMITS = [("unit", 0), ("unit", -2), ("unit", True), ("max_length", 0), ("max_length", "8")]
NO_LIMITS += [("max_tokens", value) for value in (0, 8.0, True, numpy.float64(8), None)]


def test_lengths_that_cannot_be_packed_are_named():
    with pytest.raises(ValueError, match="row 2 has 0 tokens: a row must have at least one"):
        plan([3, 9, 0], 16)
    with pytest.raises(ValueError, match="row 1 has -9 tokens"):
        plan([3, -9, 2, 2], 16, unit=2)
    with pytest.raises(ValueError, match="row 1 has 9 tokens, more than max_length 8: truncate or drop it"):
        plan([3, 9, 2], 16, max_length=8)
    with pytest.raises(ValueError, match="row 0 has 9 tokens, more than the 8 of a pack"):
        plan([9], 8, max_length=16)
    for lengths in ([3, 2.0], [3, None], ["3"]):
        with pytest.raises(ValueError, match="lengths must be whole numbers"):
            plan(lengths, 16)
    for name, value in NO_LIMITS:
        with pytest.raises(ValueError, match=re.escape(f"{name} must be a whole number above 0, got {value!r}")):
            plan([1, 2], **({"max_tokens": 8} | {name: value}))


@pytest.mark.parametrize("number", [numpy.int64, numpy.int32, torch.tensor], ids=["int64", "int32", "tensor"])
def test_limits_may_be_any_librarys_whole_numbers(number):
    packs = plan([3, 2, 4, 4], number(8), number(2), max_length=number(4))
    assert packs == plan([3, 2, 4, 4], 8, 2, max_length=4) and {type(row) for pack in packs for row in pack} == {int}
    (step,) = stream([3, 2, 4, 4], int, number(8), 2, number(2), window=2)
    assert json.loads(json.dumps(asdict(step.then)))["row"] == 4


def test_what_cannot_be_packed_is_dropped_and_counted_where_asked():
    with pytest.warns(UserWarning, match=r"^rows dropped: 3; the first: row 1 has 0 tokens"):
        assert plan([3, 0, 6, 40, 5, 4], 10, max_length=5, drop=True) == [[0], [4, 5]]
    with pytest.warns(UserWarning, match=r"^units of 2 rows dropped: 2; the first: rows 2\.\.3, .* have 12 tokens"):
        assert plan([3, 2, 6, 6, 5, 4, 0, 1], 10, unit=2, drop=True) == [[0, 1], [4, 5]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan([3, 2], 10, drop=True) == [[0, 1]]
        with pytest.raises(UserWarning, match="rows dropped: 1"):
            plan([11], 10, drop=True)


def test_lengths_may_be_any_whole_numbers():
    lengths = numpy.array([6, 5, 4, 3, 1])
    assert plan(lengths, 10) == plan(torch.tensor(lengths), 10) == plan(lengths.tolist(), 10)


def test_bad_input_is_named():
    example = Example([1, 2, 3], [False, True, True])
    with pytest.raises(ValueError, match="did you mean 'old_logp'"):
        pack([example], old_logps=[[0.0, 0.0]])
    with pytest.raises(ValueError, match=r"old_logp\[0\] must hold a number for each of the 2 predicted .* got 3"):
        pack([example], old_logp=[[0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="2 lists for 1 examples"):
        pack([example], old_logp=[[0.0], [0.0]])
    with pytest.raises(ValueError, match="label must be a tensor"):
        pack([example], label=[[1.0]])
    with pytest.raises(ValueError, match="at least one sequence"):
        pack([])
    with pytest.raises(ValueError, match="2 input_ids and 1 in loss_mask"):
        Example([1, 2], [True])
    with pytest.raises(ValueError, match="at least one token"):
        Example([], [])
