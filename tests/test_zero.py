"""What DeepSpeed is told, and what is refused before it is asked; that it trains as one process does: test_world.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

import accelerate.utils

from fastpost.trainers import zero
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
        ({"zero_optimization": {"stage": 3}}, "stage 3 is not supported: choose 1 or 2, or FSDP2"),
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
