"""docs/roles.md runs, and its table is that of the committed results, as a fresh measurement would write it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import roles as benchmark

from fastpost.models.trunk import hidden_states
from role_models import PACKED, base, write_reward

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "roles.md").read_text()
RESULTS = ROOT / "benchmarks" / "results" / "roles" / "cpu-2026-11-22.jsonl"


def test_the_example_is_a_step_of_ppo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_reward(tmp_path).rename(tmp_path / "reward-adapter")
    example = PAGE.split("```python\n")[1].split("```")[0]
    T = len(PACKED.batch.target)
    numbers = {name: torch.randn(T) for name in ("advantage", "old_value", "return_")}
    names = {"model": base(), "packed": PACKED, "batch": replace(PACKED.batch, **numbers)}
    exec(example, names)
    roles, stats = names["roles"], names["stats"]
    assert sorted(path.name for path in (tmp_path / "step-1").iterdir()) == ["policy", "value"]
    assert torch.equal(names["ref_logp"], stats.logp), "a new adapter adds nothing"
    assert names["scores"].shape == (4,) and names["old_value"].shape == (T,)
    with torch.no_grad():
        moved = hidden_states(roles.policy.model, PACKED)[0] - roles.reference.hidden(PACKED)
        assert moved.norm() > 0 and not torch.equal(roles.value(PACKED), names["old_value"])


def test_the_table_is_that_of_the_results():
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert f"<!-- table:roles -->\n{benchmark.table(lines)}\n<!-- /table -->" in PAGE


def test_one_base_holds_what_three_copies_of_it_would():
    """Measured small: what is saved is the trunk three times over, and the head once (a judge has none)."""
    shape = benchmark.Shape(hidden=64, layers=2, vocab=500, tokens=32, lora_r=2)
    one, four, whole = benchmark.lines(shape, ["float32"])
    same = "loss", "trained", "trained_parameters"
    assert [one[name] for name in same] == [four[name] for name in same] and one["loss"] != 0
    trunk = 500 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    saved = 4 * (3 * trunk + 500 * 64)
    # The buffers of rotary embeddings, and where memory was counted twice or not at all, are all that may differ.
    assert abs(four["live_bytes"] - one["live_bytes"] - saved) < 0.01 * saved
    assert whole["live_bytes"] > four["live_bytes"]


def test_models_that_are_not_the_roles_are_not_measured(monkeypatch):
    """One number of one adapter is off; or the scalar heads say nothing."""
    shape = benchmark.Shape(hidden=64, layers=1, vocab=500, tokens=32, lora_r=2)
    arranged = benchmark.arranged

    def mistaken(arrangement, *where):
        roles = arranged(arrangement, *where)
        if arrangement == "four models":
            roles.value.parameters()[0].data[0, 0] += 0.01
        return roles

    monkeypatch.setattr(benchmark, "arranged", mistaken)
    with pytest.raises(SystemExit, match="do not compute the same"):
        list(benchmark.lines(shape, ["float32"]))
    monkeypatch.setattr(benchmark, "arranged", arranged)
    drawn = torch.nn.init.normal_
    monkeypatch.setattr(
        torch.nn.init, "normal_", lambda tensor, *a, **k: tensor if tensor.shape == (1, 64) else drawn(tensor, *a, **k)
    )
    with pytest.raises(SystemExit, match="or nothing at all"):
        list(benchmark.lines(shape, ["float32"]))


def test_live_bytes_count_a_storage_once():
    before = benchmark.live_bytes()
    x = torch.zeros(1 << 20, dtype=torch.uint8)
    views = [x[:10], x.view(2, -1)]
    assert benchmark.live_bytes() - before == 1 << 20 and views
