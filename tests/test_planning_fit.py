"""What fits: a plan of the very run that is told to fit does fit, and of the next larger one does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from fastpost.planning.changes import candidates, changes
from fastpost.planning.config import Planned, PlannedGrpo, PlannedPpo, PlannedSft
from fastpost.planning.demand import demand_of
from fastpost.planning.fit import largest, largest_context, largest_rows
from fastpost.planning.plans import surveyed
from planned_runs import KINDS, run, written


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tiny"), max_position_embeddings=1 << 20)


def of_rows(config: Planned, rows: int) -> Planned:
    each = demand_of(config).each
    return replace(config, per_device_train_batch_size=rows // each)


def of_length(config: Planned, length: int) -> Planned:
    """With one sequence or pair a microbatch, and as many completions."""
    if not isinstance(config, PlannedGrpo | PlannedPpo):
        return replace(config, per_device_train_batch_size=1, max_length=length)
    share = config.max_completion_length / (config.max_prompt_length + config.max_completion_length)
    scored = -int(-length * share // 1)
    return replace(
        config,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.rows_per_step,
        max_prompt_length=length - scored,
        max_completion_length=scored,
    )


CASES = [
    *((verb, "cuda", {}) for verb in KINDS),
    *((verb, "cpu", {}) for verb in ("sft", "grpo")),
    ("grpo", "cuda", {"lora_r": 4, "load_in_4bit": True}),
    ("sft", "cuda", {"activation_offloading": True, "lora_r": 4}),
    ("sft", "cuda", {"tiled_mlp": 256, "lora_r": 4}),
    ("dpo", "cpu", {"gradient_checkpointing": False}),
]


@pytest.mark.parametrize(("verb", "device", "fields"), CASES, ids=[f"{v}, {d}, {' '.join(f)}" for v, d, f in CASES])
def test_what_is_told_to_fit_does_and_a_step_more_does_not(
    verb: str, device: Any, fields: dict[str, Any], directory: Path
):
    kind, shape = KINDS[verb]
    groups = {"gradient_accumulation_steps": 8, "generation_batch_size": 24} if verb in ("grpo", "ppo") else {}
    config = run(directory, kind, device=device, **shape, **fields, **groups)
    survey = surveyed(config)
    capacity = surveyed(of_length(config, 5000)).peak.total + 12345
    rows, context = largest_rows(survey, capacity), largest_context(survey, capacity)
    each = survey.demand.each
    assert rows and context
    assert surveyed(of_rows(config, rows)).peak.total <= capacity < surveyed(of_rows(config, rows + each)).peak.total
    assert surveyed(of_length(config, context)).peak.total <= capacity
    step = config.tiled_mlp or 1
    assert surveyed(of_length(config, context + step)).peak.total > capacity


def test_nothing_fits_into_nothing(directory: Path):
    survey = surveyed(run(directory, device="cuda"))
    assert largest_rows(survey, 1000) == 0 == largest_context(survey, 1000)


def test_the_largest_is_found_on_any_curve():
    for curve in (lambda n: 3 * n, lambda n: n * n, lambda n: max(900, n), lambda n: 10 * (n // 10)):
        found = largest(curve, 1000, 1, 1 << 20)
        assert curve(found) <= 1000 < curve(found + 1)
    assert largest(lambda n: n, 5, 1, 4) == 4 and largest(lambda n: n, 5, 6, 9) == 0


def test_few_passes_tell_of_all_that_are_on_a_line(directory: Path):
    """To the byte."""
    for fields in ({}, {"lora_r": 4}, {"lora_r": 4, "load_in_4bit": True}, {"gradient_checkpointing": False}):
        config = run(directory, device="cuda", **fields)
        known = surveyed(config)
        for rows in (3, 100, 5000):
            assert known.of(known.demand.of_rows(rows)).peak == surveyed(of_rows(config, rows)).peak
        (training,) = known.acted.growths.values()
        assert len(training.seen) == 3


def test_tiles_are_acted_out_few_and_told_of_many(directory: Path):
    config = run(directory, device="cuda", tiled_mlp=16, per_device_train_batch_size=10, lora_r=4)
    survey = surveyed(config)
    told = survey.acted.training(10, 32, "frozen", scalar=False)
    (tiles,) = survey.acted.growths.values()
    assert set(tiles.seen) == {3, 4, 5}
    assert told == tiles.trace(20).coarse()


def test_a_window_is_no_line_and_is_acted_out(tmp_path: Path):
    """Of full windows and of those that are not."""
    path = written(tmp_path, "gemma3_text", sliding_window=8, num_hidden_layers=6, max_position_embeddings=1 << 20)
    config = run(path, PlannedGrpo, max_prompt_length=2, max_completion_length=4, generation_batch_size=2)
    survey = surveyed(config)
    for length in (12, 300, 3000):
        longer = of_length(config, length)
        assert survey.of(survey.demand.of_length(length)).peak == surveyed(longer).peak


def test_a_cap_on_tokens_is_the_microbatch(directory: Path):
    demand = demand_of(run(directory, max_tokens_per_batch=100))
    assert (demand.rows, demand.length, demand.accumulates) == (3, 32, True)
    assert demand_of(run(directory, max_tokens_per_batch=1 << 16)).rows == 8, "no more than a step has"


def test_changes_are_in_order_of_what_they_save_and_do_save_it(directory: Path):
    config = run(directory, PlannedGrpo, beta=0.1, gradient_checkpointing=False, max_prompt_length=8)
    survey = surveyed(config)
    found = changes(survey, {})
    assert [c.saves for c in found] == sorted((c.saves for c in found), reverse=True) and len(found) > 2
    for change in found:
        assert change.fields in list(candidates(config))
        assert survey.peak.total - surveyed(replace(config, **change.fields)).peak.total == change.saves
    assert "--gradient_checkpointing true" in [change.flags for change in found]


def test_what_the_passes_know_nothing_of_is_not_acted_out_again(directory: Path, monkeypatch: pytest.MonkeyPatch):
    import fastpost.planning.changes as module

    surveys = []
    monkeypatch.setattr(module, "surveyed", lambda config: surveys.append(config) or surveyed(config))
    config = run(directory, PlannedSft, optim="adamw_torch")
    changes(surveyed(config), {"LoRA": surveyed(replace(config, lora_r=16))})
    assert [c.optim for c in surveys] == ["adamw_torch"] * len(surveys) and 16 in [c.lora_r for c in surveys]
    assert all(c.load_in_4bit or not c.lora_r for c in surveys), "LoRA was surveyed already"
