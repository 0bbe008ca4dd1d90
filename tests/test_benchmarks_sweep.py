"""A sweep end to end; its cost, counted, and its memory, measured, are straight lines in T and in V."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from xml.etree import ElementTree

import cases
import families
import growth
import harness
import measurement
import peers
import plots
import pytest
import sweep
import torch

from problems import small_tiles
from test_workspace import peak

OURS = ("fastpost token_stats", "fastpost fused_loss")
TINY = ["--device", "cpu", "--tokens", "32", "--hidden", "16", "--vocab", "256", "--repeats", "1"]
CHUNK = {"columns": 64, "rows": 8}  # divides each size of the tiny sweep, so that no step hides the line


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Its results file."""
    file = tmp_path_factory.mktemp("results") / "sweep.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "COPIED_BYTES", {"cpu": 1 << 20})
        small_tiles(patch, **CHUNK)
        assert sweep.main([*TINY, "--cases", "logp", "gkd", "--output", str(file)]) == 0
    return file


def test_a_sweep_is_measured_drawn_and_straight_in_what_is_counted(swept, capsys):
    found = measurement.last_run(swept)
    assert len({(m.setup.tokens, m.setup.hidden, m.setup.vocab, m.setup.dtype) for m in found}) == 12
    assert all(m.status == "ok" and m.seconds and m.errors for m in found), [m.reason for m in found]
    assert all((m.counted is not None) == (m.provider in OURS) for m in found)
    lines = [g for g in growth.growths(found) if g.provider in OURS]
    assert {(g.case, g.axis, len(g.sizes)) for g in lines} == {
        (f"{name}, W {head}", axis, 5)
        for name in ("logp", "gkd")
        for head in ("frozen", "trained")
        for axis in growth.AXES
    }
    for of in lines:
        for quantity in ("flop", "touched"):
            line = growth.fit(of.sizes, [getattr(m.counted, quantity) for m in of.measurements])
            assert line.r_squared > 1 - 1e-9 and line.worst < 1e-9, (of.case, of.axis, quantity, line)
            assert quantity == "touched" or abs(line.intercept) < 1e-9 * line.at(max(of.sizes))

    capsys.readouterr()
    assert plots.main([str(swept), "--output", str(swept.parent / "plots")]) == 0
    assert "tokens 8 to 128" in (printed := capsys.readouterr().out) and "vocab 64 to 1024" in printed
    for head in ("frozen", "trained"):
        drawn = ElementTree.parse(swept.parent / "plots" / f"sweep-{head}.svg")
        text = " ".join(each.text or "" for each in drawn.iter() if each.tag.endswith("text"))
        assert "T 32, D 16, V 256" in text and text.count("R² ") == 6, text


def test_the_sweep_ends_where_fastpost_is_wrong(tmp_path, monkeypatch, capsys):
    def off(case, x):
        found = peers.fastpost_loss(case, x)
        return replace(found, loss=found.loss * (1 + 1e-3))

    wrong = replace(sweep.SWEEP.peers[1], runs={"logp": off})
    monkeypatch.setattr(sweep, "SWEEP", replace(sweep.SWEEP, peers=(wrong,)))
    file = tmp_path / "none.jsonl"
    assert sweep.main([*TINY, "--cases", "logp", "--output", str(file)]) == 1
    assert not file.exists() and "fastpost is wrong" in capsys.readouterr().err


def test_a_shape_too_large_for_the_device_is_left_out(monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    monkeypatch.setattr(sweep, "make_inputs", full)
    setup = measurement.Setup(harness.machine(torch.device("cpu")), "2026-01-01", "bfloat16", 32, 16, 256, 1, "sweep")
    assert sweep.measure(setup, sweep.SWEEP.cases, sweep.SWEEP.peers) == []
    assert "left out" in (said := capsys.readouterr().err) and "out of memory" in said and "more" not in said


def test_a_bend_is_seen():
    xs = [1.0, 2.0, 4.0, 8.0]
    assert growth.fit(xs, [3 * x + 2 for x in xs]) == growth.Line(3.0, 2.0, 1.0, 0.0)
    bent = growth.fit(xs, [x * x for x in xs])
    assert bent.r_squared < 0.97 and bent.worst > 1


def test_sizes_that_are_not_through_the_middle_are_on_no_line(swept):
    found = measurement.last_run(swept)
    (of,) = (g for g in growth.growths(found) if (g.case, g.axis, g.provider) == ("gkd, W frozen", "tokens", OURS[1]))
    assert of.sizes == [8, 16, 32, 64, 128]
    assert {(m.setup.vocab, m.setup.hidden, m.setup.dtype) for m in of.measurements} == {(256, 16, "bfloat16")}
    assert growth.growths([m for m in found if m.setup.tokens in (8, 32)]) == [
        g for g in growth.growths(found) if g.axis == "vocab"
    ]


# ---- memory ----

D, ROWS, COLUMNS = 64, 32, 128
A_TOKEN = 80  # bytes of its statistics, their gradients, its target


def steepest(xs: Sequence[int], ys: Sequence[int]) -> float:
    """Bytes each, over the steepest stretch: what is held at one time is the most of several straight lines."""
    points = list(zip(xs, ys, strict=True))
    return max((d - b) / (c - a) for (a, b), (c, d) in pairwise(points))


@pytest.mark.parametrize("fused", [False, True], ids=["token_stats", "fused_loss"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", ["logp", "gkd"])
def test_memory_is_flat_but_for_what_has_the_size_of_a_result(name, trained, fused, monkeypatch):
    """In T: the gradient, and U or what it is before it is scaled. In V: dW and what it is summed in; rows held."""
    small_tiles(monkeypatch, columns=COLUMNS, rows=ROWS)
    monkeypatch.setattr("fastpost.core.schedules.PASS", {"cpu": ROWS * D})
    case = next(c for c in (*cases.CASES, *families.CASES) if c.name == name)
    function = peers.fastpost_loss if fused else peers.fastpost_stats

    def held(T: int, V: int) -> int:
        x = cases.make_inputs(T, D, V, torch.bfloat16, torch.device("cpu")).trained(trained)
        run = partial(peers.run, replace(case, trained=trained), function, x)
        run()
        return peak(run)

    tokens, columns = (128, 256, 512, 1024), (256, 512, 1024)
    tiles = 2 if name == "gkd" else int(fused and trained)
    assert steepest(tokens, [held(T, columns[0]) for T in tokens]) <= 2 * 2 * D + A_TOKEN
    assert steepest(columns, [held(tokens[0], V) for V in columns]) <= (2 + 4) * D * trained + 4 * ROWS * tiles
