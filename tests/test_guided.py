"""Beam search by a reward of the answer so far: by hand, against all answers, on from a kill, and at what cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("transformers")

import tiny
from fastpost.files import read_rows
from fastpost.rollout import Completion
from fastpost.stages.config import Guided
from fastpost.stages.guided import guided
from fastpost.stages.policy import Policy


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    tiny.model("qwen3").save_pretrained(directory / "model")
    tiny.tokenizer().save_pretrained(directory / "model")
    rows = [{"prompt": f"{i}+{i}="} for i in range(4)]
    (directory / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "mine.py").write_text(
        "def score(prompts, completions, **_):\n"
        "    return [None if '?' in c else sum(map(int, filter(str.isdigit, c))) / 10 for c in completions]\n\n\n"
        "def capitals(completions, **_):\n    return [sum('A' <= x <= 'Z' for x in text) / 6 for text in completions]\n"
    )
    return directory


def config_of(files: Path, out: Path, **changes: Any) -> Guided:
    fields: dict[str, Any] = {
        "reward": f"{files}/mine.py:score",
        "max_completion_length": 6,
        "generation_batch_size": 8,
        "step_separator": ";",
        "num_beams": 2,
    }
    fields |= {"model": files / "model", "dataset": files / "sums.jsonl", "output_dir": out, "num_expansions": 2}
    return Guided(**(fields | changes))


def play(monkeypatch: pytest.MonkeyPatch, files: Path, said: dict[str, list[str]]) -> list[str]:
    """A policy that goes on from each text as it is written here; `.` ends. Returns what it will be asked."""
    tokenizer, asked = tiny.tokenizer(), []
    policy = Policy.of(config_of(files, files))

    def sampler(ids: list[list[int]], sampling: Any, n: int = 1, keys: Any = None) -> list[Completion]:
        assert sampling.stop == (";",)
        texts = [str(tokenizer.decode(prompt)) for prompt in ids]
        asked.extend(texts)
        answers = [text for prompt in texts for text in said[prompt]]
        assert len(answers) == n * len(ids)
        return [Completion(tokenizer(text).input_ids, text[-1] in ";.") for text in answers]

    played: Any = Policy(policy.model, tokenizer, cast(Any, sampler), policy.sampling, policy.precision)
    monkeypatch.setattr(Policy, "of", staticmethod(lambda config: played))
    return asked


def test_the_best_beams_are_gone_on_from_until_they_have_ended(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "d.jsonl").write_text('{"prompt": "p"}\n')
    said = {
        "p": ["1;", "3;", "2.", "0;"],  # 3; and 2. are kept
        "p3;": ["1;", "?;"],  # 3;1; is, and nobody judges the other
        "p3;1;": ["0;", "1"],  # 3;1;0; at 0.4, and 3;1;1, cut off in its step, at 0.5: 2. falls out
        "p3;1;0;": ["0.", "0."],
    }
    asked = play(monkeypatch, files, said)
    report = guided(config_of(files, tmp_path / "out", dataset=tmp_path / "d.jsonl"))
    assert asked == ["p", "p3;", "p3;1;", "p3;1;0;"]
    (row,) = read_rows(str(tmp_path / "out" / "best.jsonl"))
    assert (row["completion"], row["reward"]) == ("3;1;1", 0.5)
    assert (report["steps"], report["clipped_ratio"], report["score"]) == (3, 1, 0.5)
    assert report["tokens_a_prompt"] == 8 + 4 + 3 + 4 and report["rewards"] == {"score": 0.5}
    assert "tokens_a_prompt" in capsys.readouterr().out


def test_a_search_that_is_cut_short_prefers_what_has_ended(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "d.jsonl").write_text('{"prompt": "p"}\n')
    play(monkeypatch, files, {"p": ["1;", "9;", "2.", "0;"]})
    guided(config_of(files, tmp_path / "out", dataset=tmp_path / "d.jsonl", max_solution_steps=1))
    assert read_rows(str(tmp_path / "out" / "best.jsonl"))[0]["completion"] == "2."


def test_it_goes_on_from_where_it_was_stopped(files: Path, tmp_path: Path):
    changes = {"reward": f"{files}/mine.py:capitals", "step_separator": "e", "max_solution_steps": 4}
    changes |= {"max_completion_length": 24}
    guided(config_of(files, tmp_path / "whole", **changes))
    wanted = (tmp_path / "whole" / "best.jsonl").read_bytes()
    work = (tmp_path / "whole" / "work.jsonl").read_bytes()
    assert b'"step 1/' in work
    for share in (0.3, 0.8):
        out = tmp_path / str(share)
        out.mkdir()
        (out / "work.jsonl").write_bytes(work[: int(len(work) * share)])
        guided(config_of(files, out, generation_batch_size=32, **changes))
        assert (out / "best.jsonl").read_bytes() == wanted


def test_more_beams_find_more(files: Path, tmp_path: Path):
    changes = {"reward": f"{files}/mine.py:capitals", "step_separator": "e", "max_solution_steps": 4}
    changes |= {"max_completion_length": 24}
    few, many = (guided(config_of(files, tmp_path / str(n), num_beams=n, num_expansions=n, **changes)) for n in (1, 4))
    assert many["score"] > few["score"] and many["tokens_a_prompt"] > few["tokens_a_prompt"]


def test_a_beam_that_outgrows_the_model_ends_where_it_is(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """118 tokens of prompt, 2 of a step and 6 of an answer fit in 128 positions; after `33333;` there is no room."""
    long = "p" * 118
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": long}) + "\n")
    said = {long: ["33333;", "3;", "2;", "0;"], f"{long}3;": ["1.", "0."]}
    assert play(monkeypatch, files, said) == []
    report = guided(config_of(files, tmp_path / "out", dataset=tmp_path / "d.jsonl"))
    (row,) = read_rows(str(tmp_path / "out" / "best.jsonl"))
    assert (row["completion"], report["clipped_ratio"]) == ("33333;", 1)
    assert "1 answers outgrew the model's positions, and end with step 1" in capsys.readouterr().err


def test_prompts_that_no_reward_applies_to_are_left_out(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "d.jsonl").write_text('{"prompt": "p"}\n{"prompt": "q"}\n')
    play(monkeypatch, files, {"p": ["1.", "5.", "2.", "0."], "q": ["?."] * 4})
    report = guided(config_of(files, tmp_path / "out", dataset=tmp_path / "d.jsonl"))
    assert [row["prompt"] for row in read_rows(str(tmp_path / "out" / "best.jsonl"))] == ["p"]
    assert (report["prompts"], report["score"], report["tokens_a_prompt"]) == (1, 0.5, 8)
    assert "no reward function applied to 1 of 2 prompts" in capsys.readouterr().err
    (tmp_path / "d.jsonl").write_text('{"prompt": "q"}\n')
    with pytest.raises(ValueError, match="applied to no answer of"):
        guided(config_of(files, tmp_path / "none", dataset=tmp_path / "d.jsonl"))
