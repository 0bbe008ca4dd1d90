"""Files to rows: every format, and what is said about one that is broken."""

import json

import pytest

from fastpost.files import read_rows

datasets = pytest.importorskip("datasets")


def written(tmp_path, text, name="data.jsonl"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]
    lines = "\ufeff" + "\n\n".join(json.dumps(row) for row in rows) + "\n"
    assert read_rows(written(tmp_path, lines)) == rows
    assert read_rows(written(tmp_path, json.dumps(rows), "data.json")) == rows
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(str(tmp_path / "data.parquet"))
    assert list(read_rows(tmp_path / "data.parquet")) == rows
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert list(read_rows(tmp_path / "saved")) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", '{"text": "a"}\n{"text": }\n', r"data\.jsonl, line 2, column 10: Expecting value"),
        ("data.jsonl", '{"text": "a"}\n\n["b"]\n', r"line 3: a row must be an object .* got list"),
        ("data.jsonl", b'{"text": "\xff"}\n', r"line 1: byte 11 is not UTF-8"),
        ("data.jsonl", "\n\n", r"data\.jsonl has no rows"),
        ("data.json", '{"text": "a"}', r"must hold one array of objects, got dict: is it \.jsonl\?"),
        ("data.json", '[{"text": "a"},\n x]', r"data\.json, line 2, column 2: Expecting value"),
        ("data.json", '[{"text": "a"}, 3]', r"element 1: a row must be an object .* got int"),
        ("data.parquet", "text", r"data\.parquet is not a Parquet file"),
        ("data.csv", "text", r"must end in \.jsonl, \.json, \.parquet"),
    ],
)
def test_a_broken_file_is_named_with_its_place(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_rows(written(tmp_path, content, name))


def test_a_missing_file_or_directory_is_named(tmp_path):
    written(tmp_path, "", "train.jsonl")
    with pytest.raises(ValueError, match=r"trian\.jsonl' does not exist \(did you mean 'train\.jsonl'\?\)"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(ValueError, match="not one that datasets' save_to_disk wrote"):
        read_rows(tmp_path)
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "a"}])})
    splits.save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"holds the splits \['train'\]"):
        read_rows(tmp_path / "splits")
