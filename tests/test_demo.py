"""The demo: a task that is what it says, and a run, cut to a few steps, that leaves what it promises."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fastpost import demo
from fastpost.cli import main
from fastpost.rewards.builtin import number_match
from fastpost.trainers.log import read_lines

NUMBER = re.compile(r"\d+")


def test_held_out_problems_share_no_number_with_training_ones():
    rows = demo.problems(0)
    numbers = {name: {n for row in some for n in NUMBER.findall(row["prompt"])} for name, some in rows.items()}
    assert not (numbers["demonstrations"] | numbers["prompts"]) & (numbers["validation"] | numbers["test"])
    pairs = {name: [tuple(NUMBER.findall(row["prompt"])) for row in some] for name, some in rows.items()}
    everything = [pair for some in pairs.values() for pair in some]
    assert len(everything) == len(set(everything))
    assert len(rows["test"]) >= 200


def test_every_demonstration_is_right_and_every_prompt_is_without_one():
    rows = demo.problems(1)
    for row in rows["demonstrations"] + rows["test"]:
        a, b = map(int, NUMBER.findall(row["prompt"]))
        *steps, answer = re.split(r", |\. ", row["completion"])
        for left, right in (step.split("=") for step in steps):
            assert sum(map(int, left.split("+"))) == int(right)
        assert answer == f"Answer: {a + b}" and row["answer"] == str(a + b)
    completions = [row["completion"] for row in rows["test"]]
    assert number_match(completions, answer=[row["answer"] for row in rows["test"]]) == [1.0] * len(completions)
    assert all(row.keys() == {"prompt", "answer"} for row in rows["prompts"])


def test_the_seed_makes_the_task():
    assert demo.problems(3) == demo.problems(3)
    assert demo.problems(3)["test"] != demo.problems(4)["test"]


def test_a_run_ends_with_a_table_and_a_line_of_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
):
    for name, value in {"ROUND": 2, "PATIENCE": 1, "GRPO_STEPS": 1, "VALIDATION": 8, "TEST": 16}.items():
        monkeypatch.setattr(demo, name, value)
    run = tmp_path / "run"
    assert main(["demo", "--seed", "5", "--output_dir", str(run)]) == 0
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    stages = {f"accuracy_{name}" for name in ("base", "sft", "grpo", "control")}
    assert result.keys() == stages | {"seconds", "peak_mb", "run_dir"}
    assert all(0 <= result[name] <= 1 for name in stages) and result["run_dir"] == str(run)
    assert any("random model" in line for line in out)
    curve = read_lines(run / "validation_curve.jsonl")
    assert [line["step"] for line in curve] == [2, 4]  # nothing is right yet, so the first round is the best
    control = read_lines(run / "control" / "metrics.jsonl")[-1]
    assert control["step"] > 2
    assert {"demo.png", "base", "sft", "grpo", "test.jsonl"} <= {path.name for path in run.iterdir()}
    assert main(["demo", "--output_dir", str(run)]) == 2
    assert "must be empty or not exist yet" in capsys.readouterr().err


def test_without_a_directory_each_run_gets_a_new_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    first = demo._run_dir(demo.Demo(seed=7))
    first.mkdir(parents=True)
    assert (first, demo._run_dir(demo.Demo(seed=7))) == (Path("runs/demo-7"), Path("runs/demo-7-2"))
