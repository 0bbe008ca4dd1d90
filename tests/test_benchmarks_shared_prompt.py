"""The benchmark of a shared prompt: what it writes, and that a wrong gradient gets no speed."""

import json

import pytest

pytest.importorskip("transformers")

import shared_prompt

from fastpost.shared_prompt import share_prompts

TINY = ["--case", "6", "3", "4", "--repeats", "1"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(shared_prompt, "MODEL", shared_prompt.MODEL | {"vocab_size": 64, "num_hidden_layers": 1})


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_packs_are_measured(tmp_path, capsys):
    assert shared_prompt.main([*TINY, "--output", str(tmp_path / "lines.jsonl")]) == 0
    plain, shared = lines_of(tmp_path / "lines.jsonl")
    assert (plain["provider"], plain["tokens"], plain["status"]) == ("repeated", 4 * (6 + 3), "ok")
    assert (shared["provider"], shared["tokens"], shared["status"]) == ("shared", 6 + 4 * 3, "ok")
    assert plain["seconds"] > 0 and shared["seconds"] > 0
    assert "36 -> 18 tokens, x 2.00 fewer" in capsys.readouterr().out


def test_a_wrong_gradient_has_no_speed(tmp_path, capsys, monkeypatch):
    """Completions that begin at position 0 instead of behind the prompt."""

    def forgets(packed, units):
        shared = share_prompts(packed, units)
        shared.position_ids[shared.position_ids >= 6] -= 6
        return shared

    monkeypatch.setattr(shared_prompt, "share_prompts", forgets)
    assert shared_prompt.main([*TINY, "--output", str(tmp_path / "lines.jsonl")]) == 1
    plain, shared = lines_of(tmp_path / "lines.jsonl")
    assert plain["status"] == "ok" and shared["status"] == "WRONG" and shared["seconds"] is None
    assert "WRONG: error" in capsys.readouterr().out
