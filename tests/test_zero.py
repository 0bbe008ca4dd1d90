"""What DeepSpeed is told, and what is refused before it is asked; that it trains as one process does: test_world.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

import accelerate.utils

from fastpost.trainers import engines, zero, zero3
from fastpost.trainers.config import Sft

STAGE_2 = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True}}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Says it as `accelerate launch` does, where a DeepSpeed of some version is installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(accelerate.utils, "compare_versions", lambda *words: False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")

    def tell(config: dict[str, Any]) -> None:
        (tmp_path / "ds.json").write_text(json.dumps(config))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))

    return tell


def config(**fields: Any) -> Sft:
    return Sft(model="m", dataset="d", output_dir="o", **fields)


def test_nothing_is_asked_of_deepspeed_by_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    zero.check()
    assert zero.stage() == 0


def test_a_stage_alone_is_enough(told, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    zero.check()
    assert zero.stage() == 1


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ({"zero_optimization": {"stage": 4}}, "stage 4 is not known: choose 1, 2 or 3"),
        (STAGE_2 | {"optimizer": {"type": "AdamW"}}, "leave optimizer out"),
        (STAGE_2 | {"scheduler": {"type": "WarmupLR"}}, "leave scheduler out"),
        (STAGE_2 | {"bf16": {"enabled": True}}, "leave bf16 out"),
        (STAGE_2 | {"fp16": {"enabled": True}}, "fp16 is not supported"),
    ],
)
def test_what_is_not_to_be_had_is_refused_by_name(told, said: dict[str, Any], remedy: str):
    told(said)
    with pytest.raises(ValueError, match=remedy):
        zero.check()


@pytest.mark.parametrize("enabled", ["auto", False])
def test_a_precision_that_is_off_is_no_fault(told, enabled: Any):
    told(STAGE_2 | {"bf16": {"enabled": enabled}, "fp16": {"enabled": enabled}})
    zero.check()


def test_without_deepspeed_it_is_said_how_to_have_it(told, monkeypatch: pytest.MonkeyPatch):
    told(STAGE_2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install deepspeed"):
        zero.check()


def test_an_old_deepspeed_is_refused(told, monkeypatch: pytest.MonkeyPatch):
    told(STAGE_2)
    monkeypatch.setattr(accelerate.utils, "compare_versions", lambda *words: words == ("deepspeed", "<", "0.19"))
    with pytest.raises(ValueError, match=r"must be 0\.19 or newer"):
        zero.check()


@pytest.mark.parametrize("value", ["auto", None, "the run's"])
def test_the_file_leaves_the_run_its_fields(told, value: str | None):
    ours = {"train_micro_batch_size_per_gpu": 3, "gradient_clipping": 0.5, "gradient_accumulation_steps": 4}
    said = {} if value is None else ours if value == "the run's" else dict.fromkeys(ours, "auto")
    told(STAGE_2 | said | {"train_batch_size": "auto"})
    found = zero.settings(config(per_device_train_batch_size=3, max_grad_norm=0.5, gradient_accumulation_steps=4))
    assert found["train_micro_batch_size_per_gpu"] == 3
    assert found["gradient_clipping"] == 0.5
    assert found["gradient_accumulation_steps"] == 1  # of the engine, to which a step is one
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert "train_batch_size" not in found


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size 3"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps 4"),
        ("gradient_clipping", "max_grad_norm 0.5"),
    ],
)
def test_a_file_that_says_another_is_refused(told, name: str, field: str):
    told(STAGE_2 | {name: 2})
    with pytest.raises(ValueError, match=f"{name} of the DeepSpeed config is 2 and the run's {field}: say auto"):
        zero.settings(config(per_device_train_batch_size=3, max_grad_norm=0.5, gradient_accumulation_steps=4))


# ---- stage 3 ----


@pytest.mark.parametrize(("said", "parts"), [(1, False), (2, False), (3, True)])
def test_only_stage_3_has_the_weights_in_parts(told, said: int, parts: bool):
    told({"zero_optimization": {"stage": said}})
    assert engines.shards() == parts
    assert engines.in_parts(nn.Identity()) == parts


def test_quantised_weights_are_not_cut():
    door = nn.Linear(2, 2)
    door.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="leave out load_in_4bit"):
        zero3.cut(door, {})


class Part(nn.Parameter):
    """What DeepSpeed makes of a parameter, as one of three processes has it."""

    ds_id, ds_shape, ds_numel = 0, torch.Size([2, 2]), 4

    def partition_numel(self) -> int:
        return 2


@pytest.mark.parametrize(("rank", "own"), [(0, [1.0, 2.0]), (1, [3.0, 4.0]), (2, [0.0, 0.0])])
def test_a_process_has_its_part_and_where_there_is_none_zeros(
    monkeypatch: pytest.MonkeyPatch, rank: int, own: list[float]
):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    empty = Part(torch.empty(0))
    assert zero3.own_part(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), empty).tolist() == own
    assert (zero3.full_numel(empty), zero3.full_shape(empty)) == (4, (2, 2))


# ---- precision ----


@pytest.mark.parametrize("asked", [True, False])
def test_a_pass_computes_in_the_precision_of_the_caller(asked: bool):
    def engine(work: Any) -> Any:
        """As DeepSpeed's, which knows no autocast but that of its config."""
        assert not torch.is_autocast_enabled("cpu"), "it would warn, and turn it off"
        return work()

    ones = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=asked):
        found = zero.through(engine, lambda: ones @ ones)
        assert (ones @ ones).dtype == found.dtype
    assert found.dtype == (torch.bfloat16 if asked else torch.float32)
