"""The targets of a CPU hold in the newest results that are committed, beside the peers of the same run."""

from __future__ import annotations

import json
from typing import Any

import contest
import end_to_end_table
import packer
import pytest
import step
from end_to_end import ENTRIES, Line
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


# ---- the packer ----


@pytest.fixture(scope="module")
def packed() -> dict[str, Any]:
    return json.loads(max(contest.RESULTS.glob("cpu-*-packer.json")).read_text())


def test_a_million_lengths_are_planned_in_about_a_second_and_fill_their_packs(packed):
    rows = [line for line in packed["plans"] if line["unit"] == 1]
    assert len(rows) == sum(texts.unit == 1 for texts in packer.TEXTS) and all(line["rows"] == 10**6 for line in rows)
    assert min(line["fill"] for line in packed["plans"] if line["unit"] <= 2) >= 0.99
    seconds = sorted(line["seconds"]["plan"] for line in rows)
    assert seconds[len(seconds) // 2] <= 1.5 and seconds[-1] <= 2


# ---- whole steps ----


@pytest.fixture(scope="module")
def whole() -> list[Line]:
    return end_to_end_table.read(max((contest.RESULTS / "end_to_end").glob("cpu-*.jsonl")))


def test_every_contestant_took_the_right_step_and_ours_was_the_fastest(whole):
    assert {(line.method, line.provider) for line in whole} == {(m, e.name) for e in ENTRIES for m in e.methods}
    assert {line.method for line in whole} == set(step.METHODS) and all(line.status == "ok" for line in whole)
    for method in step.METHODS:
        speed = {line.provider: line.tokens_per_second or 0.0 for line in whole if line.method == method}
        assert max(speed, key=speed.__getitem__).startswith("fastpost"), speed
