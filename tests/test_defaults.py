"""Where a default is not TRL's, the help of the field says so."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

pytest.importorskip("trl")

import trl

from fastpost.trainers import config as configs

# TRL's trainers of the same methods, but for those that are not in its stable part.
PAIRS = {
    configs.Sft: trl.SFTConfig,
    configs.Dpo: trl.DPOConfig,
    configs.Kto: trl.KTOConfig,
    configs.Reward: trl.RewardConfig,
    configs.Grpo: trl.GRPOConfig,
    configs.Rloo: trl.RLOOConfig,
    configs.Distill: trl.DistillationConfig,
}
# Ours -> TRL's, where they mean one thing.
SAME = [
    (("dpo",), ["sigmoid"]),
    (("none",), "none"),
    ((), None),
    (0.0, None),  # of a weight: nothing
    (None, 0.0),
    (0, None),  # of eval_steps: no evaluations on the way
    ("uint8", None),  # what bitsandbytes takes for it
]
# What no TRL user brings a number for: `output_dir` must be given, `project` is a name, and use_peft is lora_r's.
OTHERWISE = {"output_dir", "project", "lora_r"}


def default(field: dataclasses.Field) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def same(ours: Any, theirs: Any) -> bool:
    return ours == theirs or (ours, theirs) in SAME or ours == getattr(theirs, "value", theirs)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS.items(), ids=lambda config: config.__name__)
def test_a_default_that_is_not_trls_is_noted(ours: type, theirs: type):
    known = {field.name: default(field) for cls in (trl.ModelConfig, theirs) for field in dataclasses.fields(cls)}
    shared = [field for field in dataclasses.fields(ours) if field.name in known and field.name not in OTHERWISE]
    assert len(shared) > 30
    other = [field for field in shared if not same(field.default, known[field.name])]
    assert [(f.name, f.default, known[f.name]) for f in other if "TRL" not in f.metadata["help"]] == []
