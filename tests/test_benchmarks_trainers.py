"""`benchmarks/trainers.py`: what both are told, what counts as the same run, and the committed table."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import trainers
import trainers_ours
import trainers_table
import trainers_task
import trainers_trace
from harness import machine
from trainers import Line
from trainers_task import COLUMNS, SUMS, Job
from trainers_trace import Step, Trace, Watch

from fastpost.trainers.loop import order


def line(provider: str = "fastpost", method: str = "sft", **changes: object) -> Line:
    parts = {"rollout": 0.0, "reward": 0.0, "reference": 0.0, "update": 0.1}
    whole = Line(machine(torch.device("cpu")), "2026-01-01", "sums", method, provider, 0, {}, 0.1, 0.1, parts)
    return replace(whole, **{"losses": [2.0, 1.5], "before": 0.2, "after": 0.5, **changes})


def test_rows_come_in_the_order_in_which_fastpost_takes_them_and_with_no_other_column():
    rows = [{"prompt": str(i), "answer": "", "story": "left out"} for i in range(5)]
    job = Job("grpo", "", rows, "", {"seed": 3, "max_steps": 4, "per_device_train_batch_size": 6, "num_generations": 3})
    assert [row["prompt"] for row in job.laid_out] == [str(i) for i in order(5, 3, 0, 8)]
    assert set(job.laid_out[0]) == {"prompt", "answer"}


@pytest.mark.parametrize("method", COLUMNS)
def test_every_field_is_one_of_the_verbs_and_of_trls(method: str):
    trl = pytest.importorskip("trl")
    fields = {**trainers_task.SAME, **SUMS[method][1], **trainers_task.HEAD[method], "seed": 0}
    config_of, _ = trainers_ours.VERBS[method]
    theirs = getattr(trl, f"{method.upper()}Config")
    assert set(fields) <= set(config_of.__dataclass_fields__) & set(theirs.__dataclass_fields__)


def test_losses_that_are_apart_leave_no_speed_to_any():
    same = [line(), line("TRL", losses=[2.0, 1.5000001])]
    assert trainers.checked(same) == same
    wrong = trainers.checked([line(), line("TRL", losses=[2.0, 1.501])])
    assert [each.status for each in wrong] == ["WRONG: losses are 7e-04 apart"] * 2
    assert trainers.row(wrong[0])[2:4] == ["-", "-"]
    sampled = [line(method="grpo"), line("TRL", "grpo", losses=[0.0, 9.0])]
    assert trainers.checked(sampled) == sampled


def test_a_score_that_does_not_rise_leaves_no_speed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trainers, "right_answers", lambda model, folder: 0.5 if model == Path("a") else 0.6)
    job = Job("sft", "a", [], "b", {})
    assert trainers.scored(line(), job, Path()).status == "did not learn"
    assert trainers.scored(line(), replace(job, model="b", out="a"), Path()).status == "did not learn"


def test_a_part_within_a_part_is_of_the_outer_one(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(100))
    monkeypatch.setattr(trainers_trace.time, "perf_counter", lambda: float(next(clock)))
    watch, other = Watch(), SimpleNamespace(work=lambda: None)
    watch.around(other, "work", "reward")
    with watch.part("rollout"):
        other.work()
    assert watch.parts == [{"rollout": 1.0}]
    other.work()
    watch.end()
    assert watch.parts == [{"rollout": 1.0, "reward": 1.0}, {}] and len(watch.between()) == 1


def test_the_first_step_does_not_count():
    steps = [Step(seconds, 0.0, {}, 0.0) for seconds in (9.0, 1.0, 2.0, 3.0)]
    assert Trace(steps, 0).median(lambda step: step.seconds) == 2.0


def test_the_newest_run_of_a_seed_is_in_the_table_and_one_that_is_wrong_has_no_speed(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    lines = [line(cpu_seconds=9.0), line(), line("TRL", after=0.25, status="did not learn")]
    file.write_text("".join(json.dumps(asdict(each)) + "\n" for each in lines))
    text = trainers_table.markdown(trainers_table.read(file))
    assert "| sft, sums | **fastpost** | 0.100 |  |  |  | 100% |  | 0, 0 MB | 20% → 50% |" in text
    assert "| sft, sums | TRL | did not learn |" in text


def test_a_row_learned_where_its_seeds_together_rose(tmp_path: Path):
    file, chance = tmp_path / "lines.jsonl", {"after": 0.28, "status": "did not learn"}
    file.write_text("".join(json.dumps(asdict(line(seed=seed, **chance))) + "\n" for seed in range(1)))
    assert "| did not learn |" in trainers_table.markdown(trainers_table.read(file))
    file.write_text("".join(json.dumps(asdict(line(seed=seed, **chance))) + "\n" for seed in range(2)))
    assert "| 20% → 28% |" in trainers_table.markdown(trainers_table.read(file))


# ---- the committed runs ----


def test_the_page_has_the_table_of_the_committed_runs_and_all_of_fastposts_are_right():
    runs = trainers_table.read(max(trainers.RESULTS.glob("cpu-*.jsonl")))
    assert set(runs) == {(setting, method) for setting in trainers.SETTINGS for method in COLUMNS}
    assert all(each.status == "ok" for by_name in runs.values() for each in by_name["fastpost"])
    page = trainers_table.PAGE.read_text()
    assert f"<!-- table:trainers -->\n{trainers_table.markdown(runs)}<!-- /table -->" in page, "run `make readme`"
