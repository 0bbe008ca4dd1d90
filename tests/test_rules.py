"""The tests' own tools, each shown to fail: a rule that passes everything would make the whole suite decoration."""

from __future__ import annotations

import pytest
import torch

import conftest
from rules import assert_close_to_truth, assert_gradient_close_to_truth

TRUTH = torch.linspace(-3, 3, 50, dtype=torch.float64)


def shifted(by: float) -> torch.Tensor:
    return TRUTH + by


def test_a_statistic_may_err_twice_as_much_as_torch_and_a_hair_more():
    assert_close_to_truth(shifted(2.0e-3), shifted(1e-3), TRUTH)
    assert_close_to_truth(shifted(0.9e-5), shifted(0.0), TRUTH)
    with pytest.raises(AssertionError, match=r"worst error 2\.10e-03, torch's own allows 2\.01e-03"):
        assert_close_to_truth(shifted(2.1e-3), shifted(1e-3), TRUTH)
    with pytest.raises(AssertionError, match="worst error"):
        assert_close_to_truth(shifted(1.1e-5), shifted(0.0), TRUTH)


def test_a_gradient_is_judged_by_its_norm():
    assert_gradient_close_to_truth(shifted(2.0e-3), shifted(1e-3), TRUTH)
    with pytest.raises(AssertionError, match="of norm"):
        assert_gradient_close_to_truth(shifted(2.1e-3), shifted(1e-3), TRUTH)
    with pytest.raises(AssertionError, match="of norm"):
        assert_gradient_close_to_truth(torch.full_like(TRUTH, 1e-30), 0 * TRUTH, 0 * TRUTH)


@pytest.mark.parametrize("rule", [assert_close_to_truth, assert_gradient_close_to_truth])
def test_both_rules_refuse_nan_a_wrong_shape_and_a_truth_that_is_rounded(rule):
    nan = TRUTH.clone()
    nan[7] = float("nan")
    with pytest.raises(AssertionError, match="nan"):
        rule(nan, TRUTH, TRUTH)
    with pytest.raises(AssertionError, match="shapes"):
        rule(TRUTH[:1], TRUTH, TRUTH)
    with pytest.raises(AssertionError, match="float64"):
        rule(TRUTH, TRUTH, TRUTH.float())


ALLOCATIONS = [
    "torch.empty(3, 2)",
    "torch.empty_like(x)",
    "torch.empty_strided((3,), (2,))",
    "x.new_empty(4)",
    "x.new_empty_strided((3,), (1,))",
]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("ours", [True, False], ids=["our files", "other files"])
def test_memory_is_poisoned_in_our_files_alone(allocation, ours):
    path = str(conftest.ROOT / "fastpost" / "any.py") if ours else "/elsewhere/any.py"
    where = {"torch": torch, "x": torch.zeros(3)}
    exec(compile(f"first, second = {allocation}.fill_(1.0), {allocation}", path, "exec"), where)
    assert bool(where["second"].isnan().all()) is ours
    assert bool((where["first"] == 1).all())


def test_integers_are_poisoned_too():
    where = {"torch": torch}
    exec(compile("y = torch.empty(3, dtype=torch.int64)", str(conftest.ROOT / "kernels" / "any.py"), "exec"), where)
    assert where["y"].tolist() == [torch.iinfo(torch.int64).min] * 3
