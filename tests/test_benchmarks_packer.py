"""The packer's benchmark: what is written is all there, TRL needs as many packs, a wrong plan has no speed."""

from __future__ import annotations

import json

import packer
import pytest


def test_everything_is_measured_and_written(tmp_path, capsys):
    output = tmp_path / "results" / "packer.json"
    assert packer.main(["--rows", "4000", "--repeats", "1", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["machine"]["device"] == "cpu" and found["run"] and found["width"] == packer.WIDTH
    assert [line["name"] for line in found["plans"]] == [texts.name for texts in packer.TEXTS]
    for line in found["plans"]:
        assert 0 < line["fill"] <= 1 and {"plan", "best fit, Python"} <= line["seconds"].keys()
        assert all(seconds > 0 for seconds in line["seconds"].values())
    assert {(line["ranks"], line["packs_per_step"]) for line in found["ranks"]} == set(packer.RANKS)
    assert all(1 <= line["step"]["mean"] <= line["pack by pack"]["worst"] for line in found["ranks"])
    assert {line["window"] for line in found["streams"]} == set(packer.WINDOWS)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("plans", "ranks", "streams", "windows waited", str(output)))


def test_trl_needs_as_many_packs():
    pytest.importorskip("trl")
    for texts in packer.TEXTS[:3]:
        line = packer.measure_trl(texts, 2000, 1)
        assert line and line["packs"] == line["TRL's packs"]


@pytest.mark.parametrize("wrong", ["twice", "missing", "torn", "full"])
def test_a_wrong_plan_is_not_timed(monkeypatch, wrong):
    texts = packer.Texts("pairs", 10, 0.5, 50, 100, unit=2)

    def plan(lengths, room, unit):
        packs = [[i, i + 1] for i in range(0, len(lengths), 2)]
        changed = {"twice": [*packs, packs[0]], "missing": packs[1:], "torn": [[0, 2], [1, 3], *packs[2:]]}
        return changed.get(wrong, [list(range(len(lengths)))])

    monkeypatch.setattr(packer, "plan", plan)
    with pytest.raises(ValueError, match="the plan of pairs is wrong, so it has no speed"):
        packer.measure_plan(texts, 200, 1)
