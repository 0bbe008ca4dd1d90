"""A journal keeps what was done, whenever the process ends, and no work of another run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpost.stages.journal import Journal

FACTS = {"model": "m", "seed": 1}


def test_what_is_added_is_there_when_it_is_opened_again(tmp_path: Path):
    journal = Journal(tmp_path / "new" / "work.jsonl", FACTS)
    journal.add({"0": {"text": "größer\n"}, "1": [1, None]})
    journal.add({"2": 3.5})
    again = Journal(journal.file, FACTS)
    assert [again[key] for key in "012"] == [journal[key] for key in "012"] == [{"text": "größer\n"}, [1, None], 3.5]
    assert "3" not in again and len(again) == 3


def test_a_process_may_die_at_any_byte(tmp_path: Path):
    file = tmp_path / "work.jsonl"
    journal = Journal(file, FACTS)
    journal.add({"0": "é", "1": "b"})
    text = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(text) if byte == ord("\n")]
    for size in range(len(text) + 1):
        file.write_bytes(text[:size])
        left = Journal(file, FACTS)
        assert len(left) == max(0, sum(end <= size for end in ends) - 1)
        left.add({"9": "c"})
        assert Journal(file, FACTS)["9"] == "c"


def test_work_of_another_run_is_refused_by_what_differs(tmp_path: Path):
    Journal(tmp_path / "work.jsonl", FACTS)
    with pytest.raises(ValueError, match=r"done with seed 1, not 2: go on with that, or choose another output_dir"):
        Journal(tmp_path / "work.jsonl", FACTS | {"seed": 2})
    with pytest.raises(ValueError, match=r"done with top_k None, not 5"):
        Journal(tmp_path / "work.jsonl", FACTS | {"top_k": 5})


@pytest.mark.parametrize("changed", ["rows.jsonl", "mine.py", "model/model.safetensors"])
def test_work_on_what_a_file_held_before_is_refused(tmp_path: Path, changed: str):
    (tmp_path / "model").mkdir()
    for name in ("rows.jsonl", "mine.py", "model/model.safetensors"):
        (tmp_path / name).write_text("one")
    facts = {"dataset": f"{tmp_path}/rows.jsonl", "reward": [f"{tmp_path}/mine.py:right"], "hint": "x" * 5000, "n": 3}
    facts |= {"model": f"{tmp_path}/model"}
    Journal(tmp_path / "work.jsonl", facts).add({"0": "a"})
    (tmp_path / "model" / "metrics.jsonl").write_text("no part of a model")
    assert "0" in Journal(tmp_path / "work.jsonl", facts)
    (tmp_path / changed).write_text("other")
    named = tmp_path / changed.removesuffix("/model.safetensors")
    with pytest.raises(ValueError, match=f"done with the contents of {named} '[0-9a-f]+', not '[0-9a-f]+'"):
        Journal(tmp_path / "work.jsonl", facts)


def test_another_file_is_not_written_over(tmp_path: Path):
    (tmp_path / "work.jsonl").write_text("a diary\n")
    with pytest.raises(ValueError, match=r"is not what a stage wrote"):
        Journal(tmp_path / "work.jsonl", FACTS)
    assert (tmp_path / "work.jsonl").read_text() == "a diary\n"
