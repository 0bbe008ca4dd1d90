"""What a stage leaves reads back, and is never half."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastpost.files import read_rows
from fastpost.stages.rows import table, write_json, write_rows


def test_rows_read_back(tmp_path: Path):
    rows = [{"prompt": "größer\n", "reward": None}, {"prompt": "b", "reward": 1.5}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    write_json(tmp_path / "report.json", {"n": 2})
    assert json.loads((tmp_path / "report.json").read_text()) == {"n": 2}


def test_a_file_is_old_or_new(tmp_path: Path):
    def broken():
        yield {"prompt": "a"}
        raise KeyboardInterrupt

    write_rows(tmp_path / "rows.jsonl", [{"prompt": "old"}])
    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path / "rows.jsonl", broken())
    assert read_rows(tmp_path / "rows.jsonl") == [{"prompt": "old"}]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_table_has_a_column_a_name():
    text = table([{"n": 1, "reward": 0.12345}, {"n": 16, "reward": None}, {"n": 4, "note": "x"}])
    assert text.splitlines() == [" n  reward  note", " 1   0.123", "16", " 4             x"]
