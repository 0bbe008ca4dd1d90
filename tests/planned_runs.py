"""Configs of tiny models, and the runs that are planned over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

import tiny
from fastpost.planning.config import PlannedDpo, PlannedGrpo, PlannedPpo, PlannedReward, PlannedSft
from fastpost.planning.outline import Outline, outline
from fastpost.planning.source import architecture

SMALL = {"num_hidden_layers": 1}
SAMPLED = {"max_prompt_length": 8, "max_completion_length": 24}
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "sft": (PlannedSft, {}),
    "dpo": (PlannedDpo, {"max_length": 32}),
    "reward": (PlannedReward, {"max_length": 32}),
    "grpo": (PlannedGrpo, {"beta": 0.1, **SAMPLED}),
    "ppo": (PlannedPpo, SAMPLED),
}


def written(path: Path, family: str = "llama", **changes: Any) -> Path:
    """The config of a tiny model, and nothing else."""
    CONFIG_MAPPING[family](**(tiny.SHAPE | SMALL | changes)).save_pretrained(path)
    return path


def run(directory: Path, kind: type = PlannedSft, **fields: Any) -> Any:
    short = {"max_length": 32} if kind is PlannedSft else {}
    return kind(**({"model": str(directory), "device": "cpu"} | short | fields))


def outlined(config: Any) -> Outline:
    return outline(config, config.device, architecture(config))
