"""`make learn`: what counts as learning, what a run writes, and that every method of the committed runs did learn."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import learn
import learn_methods
import learn_report
import learn_task
from harness import machine
from learn import Line
from learn_methods import METHODS

SEEDS = (0, 1, 2)
MINUTES = 45
LONGEST = 120  # seconds of a run


def line(method: str = "grpo", seed: int = 0, *scores: float) -> Line:
    curve = list(enumerate(scores or (0.3, 0.7)))
    told = ("sft", "prompts", {"max_steps": len(curve) - 1})
    measured = machine(torch.device("cpu"))
    return Line(measured, "2026-01-01", method, seed, *told, 400, len(curve) - 1, curve, 2.0, 1.0, "learned")


@pytest.mark.parametrize(
    ("before", "after", "rose"), [(0.0, 0.0, False), (0.5, 0.6, False), (0.5, 0.62, True), (0.6, 0.5, False)]
)
def test_a_rise_is_beyond_three_standard_errors(before: float, after: float, rose: bool):
    """Of two shares of 400 near a half: 3 sqrt(2 / 4 / 400) = 0.106."""
    assert learn.rises(before, after, 400) is rose


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_scored_on_the_way_and_comes_after_what_it_wants(tmp_path: Path, name: str):
    method = METHODS[name]
    config = method.configured(tmp_path, 0, tmp_path / name)
    assert config.max_steps % config.save_steps == 0
    order = list(METHODS)
    assert all(order.index(other) < order.index(name) for other in method.wants)


def test_a_run_writes_a_line_and_one_that_does_not_learn_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
):
    few = replace(METHODS["sft"], fields={**METHODS["sft"].fields, "max_steps": 2}, points=2)
    monkeypatch.setitem(learn_methods.METHODS, "sft", few)
    monkeypatch.setattr(learn_task, "HELD_OUT", 8)
    output = tmp_path / "lines.jsonl"
    words = ["sft", "--seeds", "3", "--folder", str(tmp_path / "runs"), "--output", str(output)]
    assert learn.main(words) == 1
    assert "sft        seed 3    0.0% ->   0.0%" in (said := capsys.readouterr().out) and "did not learn" in said
    (runs,) = learn_report.read(output).values()
    assert runs[0].curve == [(0, 0.0), (1, 0.0), (2, 0.0)] and runs[0].seconds > 0
    assert asdict(runs[0])["fields"]["learning_rate"] == few.fields["learning_rate"]


def test_the_newest_run_of_a_seed_counts(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    lines = [line("grpo", 0, 0.1, 0.2), line("grpo", 1), line("grpo", 0, 0.1, 0.9), line("sft", 0, 0.0, 0.3)]
    file.write_text("".join(json.dumps(asdict(each)) + "\n" for each in lines))
    runs = learn_report.read(file)
    assert list(runs) == ["sft", "grpo"] and [each.after for each in runs["grpo"]] == [0.9, 0.7]


def test_runs_of_the_same_seeds_are_compared():
    """Differences 0.01, 0.02, 0.03: mean 0.02, standard error 0.01 / sqrt(3)."""
    ones, others = ([line("", s, 0.3, 0.7 + d * (s + 1)) for s in SEEDS] for d in (0.01, 0.0))
    difference, within = learn_report.apart(ones, others)
    assert difference == pytest.approx(0.02) and within == pytest.approx(4.303 * 0.01 / 3**0.5)


# ---- the committed runs ----


@pytest.fixture(scope="module")
def committed() -> dict[str, list[Line]]:
    return learn_report.read(max(learn.RESULTS.glob("cpu-*.jsonl")))


def test_every_method_learned_with_every_seed(committed: dict[str, list[Line]]):
    assert list(committed) == list(METHODS)
    for name, lines in committed.items():
        assert tuple(each.seed for each in lines) == SEEDS
        for each in lines:
            assert each.fields == json.loads(json.dumps(dict(METHODS[name].fields))), f"{name} has changed since"
            assert each.status == ("learned" if METHODS[name].must_learn else "control"), (name, each.curve)
            assert learn.rises(each.before, each.after, each.held_out) or not METHODS[name].must_learn


def test_ppo_and_grpo_reach_the_same_score_from_the_same_models(committed: dict[str, list[Line]]):
    ppo, grpo = committed["ppo"], committed["grpo"]
    assert [each.before for each in ppo] == [each.before for each in grpo]
    difference, within = learn_report.apart(ppo, grpo)
    assert abs(difference) <= within


def test_they_took_no_longer_than_promised(committed: dict[str, list[Line]]):
    every = [each for lines in committed.values() for each in lines]
    assert max(each.cpu_seconds for each in every) <= LONGEST
    assert sum(each.cpu_seconds for each in every) <= 60 * MINUTES


def test_the_page_has_their_table_and_curves(committed: dict[str, list[Line]], tmp_path: Path):
    page = learn_report.PAGE.read_text()
    assert f"<!-- table:learn -->\n{learn_report.markdown(committed)}<!-- /table -->" in page, "run `make readme`"
    file = max(learn.RESULTS.glob("cpu-*.jsonl")).with_suffix(".svg")
    assert f"(../benchmarks/results/learn/{file.name})" in page and file.exists()
    learn_report.draw(committed, drawn := tmp_path / "curves.svg")
    assert all(f">{name}<" in drawn.read_text() for name in committed)
