"""Monte-Carlo labels of steps: shares of completions that are right, where work goes on, and what prm reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import tiny
from fastpost.data import check_columns
from fastpost.files import read_rows
from fastpost.rollout import Completion
from fastpost.stages.config import PrmLabel
from fastpost.stages.groups import Answer, Group
from fastpost.stages.policy import Policy
from fastpost.stages.step_labels import prm_label, solutions_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    tiny.model("qwen3").save_pretrained(directory / "model")
    tiny.tokenizer().save_pretrained(directory / "model")
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(4)]
    (directory / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "mine.py").write_text(
        "def odd(completions, **_):\n    return [len(c) % 2 for c in completions]\n\n\n"
        "def ends_in_r(completions, **_):\n    return [None if 'none' in c else c.endswith('r') for c in completions]\n"
    )
    return directory


def fields(files: Path, out: Path) -> dict[str, Any]:
    found = {"max_completion_length": 12, "generation_batch_size": 8, "step_separator": "a", "num_generations": 3}
    found |= {"model": files / "model", "dataset": files / "sums.jsonl", "output_dir": out, "num_completions": 4}
    return found | {"reward": f"{files}/mine.py:odd"}


def config_of(files: Path, out: Path, **changes: Any) -> PrmLabel:
    return PrmLabel(**(fields(files, out) | changes))


def scripted(said: dict[str, list[str]]) -> Any:
    """A sampler that answers each text by what is written for it, and never for anything else."""
    tokenizer = tiny.tokenizer()

    def sampler(ids: list[list[int]], sampling: Any, n: int = 1, keys: Any = None) -> list[Completion]:
        answers = [text for prompt in ids for text in said[str(tokenizer.decode(prompt))]]
        assert len(answers) == n * len(ids)
        return [Completion(tokenizer(text).input_ids, True) for text in answers]

    return sampler


def test_a_label_is_the_share_of_completions_that_are_right(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Two prompts; the second solution of the first is the same as the first, and shares no work with the other prompt.
    What follows `1;` is right in three of four, what follows `1;2;` in none."""
    (tmp_path / "d.jsonl").write_text('{"prompt": "p"}\n{"prompt": "q", "answer": 3}\n')
    said = {
        "p": ["1;2;w", "1;2;w", "1;r"],
        "q": ["r", "none", "none"],
        "p1;": ["r", "2;r", "w", "r"],
        "p1;2;": ["w", "w", "none", "w"],
    }
    policy = Policy.of(config_of(files, tmp_path))
    asked_for = Policy(policy.model, tiny.tokenizer(), scripted(said), policy.sampling, policy.precision)
    monkeypatch.setattr(Policy, "of", staticmethod(lambda config: asked_for))
    changes = {"dataset": tmp_path / "d.jsonl", "reward": f"{files}/mine.py:ends_in_r", "step_separator": ";"}
    report = prm_label(config_of(files, tmp_path / "out", **changes))
    rows = read_rows(str(tmp_path / "out" / "steps.jsonl"))
    assert rows == [
        {
            "prompt": "p",
            "completions": ["1", "2", "w"],
            "labels": [True, False, False],
            "soft_labels": [0.75, 0.0, 0.0],
        },
        {"prompt": "p", "completions": ["1", "r"], "labels": [True, True], "soft_labels": [0.75, 1.0]},
        {"prompt": "q", "completions": ["r"], "labels": [True], "soft_labels": [1.0]},
    ]
    check_columns(rows, "prm", "steps.jsonl")
    assert report["beginnings_completed"] == 2 and report["not_judged"] == 0
    assert report["by_place"][0] == {"step": 1, "steps": 3, "can be completed": 1.0, "completed": 2.5 / 3}
    assert "can be completed" in capsys.readouterr().out
    prm_label(config_of(files, tmp_path / "soft", **changes, labels="soft"))
    assert read_rows(str(tmp_path / "soft" / "steps.jsonl"))[0]["labels"] == [0.75, 0.0, 0.0]


def test_a_step_of_which_nobody_judged_a_completion_takes_its_solution_out(files: Path, tmp_path: Path):
    config = config_of(files, tmp_path, step_separator=";")
    group = Group(0, "p", {}, [Answer("a;r", 2, True, reward=None), Answer("b;r", 2, True, reward=0.6)])
    (solution,) = solutions_of([group], config)
    assert (solution.steps, solution.right, list(solution.beginnings())) == (("b", "r"), True, [(0, ("b",))])
    with pytest.raises(ValueError, match="applied to no answer"):
        solutions_of([Group(0, "p", {}, [Answer("a", 1, True)])], config)


def test_labels_are_the_same_whatever_the_batches_and_wherever_it_stopped(files: Path, tmp_path: Path):
    prm_label(config_of(files, tmp_path / "whole"))
    wanted = (tmp_path / "whole" / "steps.jsonl").read_bytes()
    assert wanted.count(b"\n") > 4 and len({*map(len, json.loads(b"[" + wanted[:-1].replace(b"\n", b",") + b"]"))}) == 1
    work = (tmp_path / "whole" / "work.jsonl").read_bytes()
    for share in (0.2, 0.6, 0.95):
        out = tmp_path / str(share)
        out.mkdir()
        (out / "work.jsonl").write_bytes(work[: int(len(work) * share)])
        prm_label(config_of(files, out, generation_batch_size=24))
        assert (out / "steps.jsonl").read_bytes() == wanted
    with pytest.raises(ValueError, match="holds work that was done with num_completions 4, not 5"):
        prm_label(config_of(files, tmp_path / "whole", num_completions=5))


def test_a_solution_whose_steps_leave_no_room_is_left_out(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """110 tokens of prompt and 12 of a completion leave 6 of 128 positions for the steps before it."""
    long = "p" * 110
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": long}) + "\n")
    said = {long: ["1;r", "1;2;r", "12345678;r"], f"{long}1;": ["r"] * 4, f"{long}1;2;": ["w"] * 4}
    policy = Policy.of(config_of(files, tmp_path))
    asked_for = Policy(policy.model, tiny.tokenizer(), scripted(said), policy.sampling, policy.precision)
    monkeypatch.setattr(Policy, "of", staticmethod(lambda config: asked_for))
    changes = {"dataset": tmp_path / "d.jsonl", "reward": f"{files}/mine.py:ends_in_r", "step_separator": ";"}
    report = prm_label(config_of(files, tmp_path / "out", **changes))
    found = [row["completions"] for row in read_rows(str(tmp_path / "out" / "steps.jsonl"))]
    assert found == [["1", "r"], ["1", "2", "r"]] and report["not_judged"] == 1
    assert "1 beginnings leave the model no positions for a completion" in capsys.readouterr().err
