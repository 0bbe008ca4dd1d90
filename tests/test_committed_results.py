"""The targets of the head on a CPU hold in the newest results that are committed, beside the peers of the same run."""

from __future__ import annotations

import contest
import pytest
from measurement import Measurement, last_run

MB = 10**6
OVER_FLOOR = 1.10
WORKSPACE = 64 * MB
ERROR = 1e-5  # of a log-probability, against float64
# Whose time, in which case, against how many plain products: those of its schedule.
TARGETS = {
    "frozen": ("fastpost token_stats", "logp, W frozen", 2),
    "lazy": ("fastpost token_stats", "logp, W trained", 4),
    "eager": ("fastpost fused_loss", "sft, W trained", 3),
}
PEERS = ("naive torch", "torch linear_cross_entropy", "TRL", "Liger")


@pytest.fixture(scope="module")
def run() -> list[Measurement]:
    runs = [last_run(file) for file in sorted(contest.RESULTS.glob("cpu-*.jsonl"))]
    return max((run for run in runs if run[0].setup.bench == "head"), key=lambda run: run[0].setup.run)


def test_it_is_of_the_shape_that_the_targets_are_for(run):
    setup = run[0].setup
    assert (setup.tokens, setup.hidden, setup.vocab, setup.dtype) == (1024, 1024, 131072, "bfloat16")


@pytest.mark.parametrize("name", TARGETS)
def test_a_schedule_is_near_its_floor_in_a_bounded_workspace(run, name):
    provider, case, products = TARGETS[name]
    (m,) = (m for m in run if (m.provider, m.case) == (provider, case))
    assert m.status == "ok" and m.seconds and m.product_seconds and m.peak_bytes is not None
    assert m.seconds <= OVER_FLOOR * products * m.product_seconds
    assert m.peak_bytes <= WORKSPACE


def test_log_probabilities_are_exact_to_fp32(run):
    errors = [m.errors["logp"] for m in run if m.provider.startswith("fastpost") and "logp" in m.errors]
    assert errors and max(errors) <= ERROR


def test_nothing_of_ours_is_wrong_and_every_peer_was_there(run):
    assert all(m.status == "ok" for m in run if m.provider.startswith("fastpost"))
    present = {m.provider for m in run if m.status == "ok" and m.case == "logp, W trained"}
    assert all(any(name.startswith(peer) for name in present) for peer in PEERS)
