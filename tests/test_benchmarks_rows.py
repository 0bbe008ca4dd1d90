"""benchmarks/rows.py: kernels are timed side by side, a wrong one is named, and so is who wins."""

from __future__ import annotations

from pathlib import Path

import forwards
import harness
import measurement
import pytest
import rows
import tiles
import torch

ROWS = ["--device", "cpu", "--tokens", "16", "--hidden", "24", "--vocab", "301", "--repeats", "1", "--tile", "6", "64"]


@pytest.fixture(autouse=True)
def a_small_copy(monkeypatch):
    monkeypatch.setattr("harness.COPIED_BYTES", {"cpu": 1 << 20})


def measured_rows(tmp_path: Path) -> tuple[int, list[measurement.Measurement]]:
    output = tmp_path / "rows.jsonl"
    code = rows.main([*ROWS, "--output", str(output)])
    return code, measurement.last_run(output)


def test_row_kernels_are_measured_beside_each_other(tmp_path):
    code, read = measured_rows(tmp_path)
    on_tiles = {f"{task.name}{where}, 6 x 64" for task in tiles.TASKS for where in ("", " behind its product")}
    assert code == 0 and {m.case for m in read} == on_tiles | {f"statistics, {v.name}" for v in forwards.VARIANTS}
    fold = next(m for m in read if m.case == "fold, 6 x 64" and m.provider == "fastpost")
    assert fold.counted.fetched == 6 * 64 * 4 and fold.over_bound > 0 and fold.errors["result"] < 1e-5
    fp32 = next(m for m in read if m.case == "statistics, fp32")
    assert (fp32.setup.dtype, fp32.setup.tokens) == ("float32", 2)


def test_a_row_kernel_that_is_wrong_or_fails_is_left_out_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    class Wrong(tiles.TorchRows):
        def grads(self, tile, *others):
            super().grads(tile * 1.01, *others)

        def fold(self, *others):
            raise RuntimeError("out of resources\nmore")

    monkeypatch.setattr(tiles, "row_kernels", lambda device, dtype: Wrong())
    code, read = measured_rows(tmp_path)
    assert code == 1
    status = {m.case: m.status for m in read if m.provider == "fastpost"}
    assert (status["grads, 6 x 64"], status["fold behind its product, 6 x 64"]) == ("WRONG", "failed")
    assert all(m.seconds is None for m in read if m.provider == "fastpost")
    assert all(m.status == "ok" and m.seconds > 0 for m in read if m.provider != "fastpost")
    printed = capsys.readouterr().out
    assert "WRONG: fastpost, grads, 6 x 64: error " in printed
    assert "failed: fastpost, fold, 6 x 64: RuntimeError: out of resources\n" in printed


def taken(times: dict[str, dict[str, float | None]]) -> list[measurement.Measurement]:
    """Measurements of these cases: who took how many seconds."""
    setup = measurement.Setup(harness.machine(torch.device("cpu")), "2026-01-01", "bfloat16", 16, 24, 301, 1, "rows")
    return [
        measurement.Measurement(setup, case, 1, name, "fastpost", "0", "", "ok", seconds=seconds)
        for case, each in times.items()
        for name, seconds in each.items()
    ]


def test_the_cuda_twin_has_a_verdict_for_each_task(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    found = taken(
        {
            "fold": {"torch": 1.0, "fastpost": 2.0, "triton 1 x 1": 1.5, "cuda, 1 threads": 1.2, "cuda, 2": 1.6},
            "grads": {"fastpost": 2.0, "triton 1 x 1": 2.1, "cuda, 1 threads": 2.5},
            "else": {"fastpost": 2.0, "cuda, 1 threads": None},
            "plain": {"products and folds": 2.0, "tile-fused": 2.5},
        }
    )
    monkeypatch.setattr(tiles.cuda_rows, "find_nvcc", lambda: "nvcc")
    assert tiles.verdicts(found, gpu) == [
        "fold: cuda, 1 threads wins, 0.80 x the time of triton 1 x 1",
        "grads: cuda, 1 threads loses, 1.25 x the time of fastpost",
        "else: no verdict, for want of a cuda twin that is right",
    ]
    assert tiles.verdicts(found, cpu) == ["the cuda twin: no verdict, for want of a GPU of NVIDIA's"]
    assert tiles.cuda_rows.candidates(cpu, tiles.TorchRows()) == {}
    monkeypatch.setattr(tiles.cuda_rows, "find_nvcc", lambda: None)
    assert tiles.verdicts(found, gpu)[0].startswith("the cuda twin: no verdict, for want of nvcc")


def test_the_tile_fused_forward_has_a_verdict_for_each_variant():
    times = {
        "plain": {"products and folds": 2.0, "tile-fused": 2.5, "tile-fused 1 x 1": 1.5},
        "one": {"products and folds": 2.0, "tile-fused": 2.5},
        "two": {"products and folds": 2.0, "tile-fused": None},
    }
    assert forwards.verdicts(taken(times)) == [
        "plain: tile-fused 1 x 1 wins, 0.75 x the time of products and folds",
        "one: tile-fused loses, 1.25 x the time of products and folds",
        "two: no verdict, for want of a tile-fused forward that is right",
    ]
