"""The tables of docs/memory.md: how many GPUs a plan asks for, plans beside measurements. `make readme` writes them.

The shapes are those of Llama 3 8B and 70B (arXiv:2407.21783), whose configs are made on the spot.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastpost.planning.config import Planned, PlannedGrpo, PlannedPpo
from fastpost.planning.fit import gpus_needed
from fastpost.planning.plans import surveyed
from fastpost.planning.report import GB

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "memory.md"
RESULTS = ROOT / "benchmarks" / "results" / "planned" / "cpu-2026-11-22.jsonl"
GPU = 80
SHAPES: dict[str, dict[str, int]] = {
    "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "70B": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
}
SAME = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
# A microbatch of 4 sequences; 16 completions decoded together.
STEP: dict[str, Any] = {"max_prompt_length": 512, "max_completion_length": 1536, "generation_batch_size": 16}
ROWS: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}
LORA = {"lora_r": 16}
QLORA = LORA | {"load_in_4bit": True}
RUNS: tuple[tuple[str, type[Planned], dict[str, Any]], ...] = (
    ("PPO, four models, full", PlannedPpo, {"roles": "separate"}),
    ("PPO, four models, LoRA", PlannedPpo, {"roles": "separate"} | LORA),
    ("PPO, one base, LoRA", PlannedPpo, LORA),
    ("PPO, one base, QLoRA", PlannedPpo, QLORA),
    ("GRPO, two models, full", PlannedGrpo, {"beta": 0.04}),
    ("GRPO, one base, LoRA", PlannedGrpo, {"beta": 0.04} | LORA),
    ("GRPO, one base, QLoRA", PlannedGrpo, {"beta": 0.04} | QLORA),
)


def write_config(name: str, directory: Path) -> Path:
    from transformers import LlamaConfig

    path = directory / name
    LlamaConfig(**SHAPES[name], **SAME, architectures=["LlamaForCausalLM"]).save_pretrained(path)
    return path


def row(name: str, what: str, kind: type[Planned], fields: dict[str, Any], directory: Path) -> str:
    survey = surveyed(kind(model=str(directory), **STEP, **ROWS, **fields))
    needed = gpus_needed(survey, round(GPU * GB))
    sizes = f"{survey.rests / GB:.0f} GB | {survey.peak.total / GB:.0f} GB"
    return f"| {what}, {name} | {sizes} | {needed or 'none will do'} |"


def headline(names: tuple[str, ...] = tuple(SHAPES)) -> Iterator[str]:
    yield f"| | rests | at most | GPUs of {GPU} GB |"
    yield "|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            directory = write_config(name, Path(folder))
            yield from (row(name, what, kind, fields, directory) for what, kind, fields in RUNS)


def measured() -> str:
    sys.path.append(str(ROOT / "benchmarks"))
    import planned

    return planned.table([json.loads(line) for line in RESULTS.read_text().splitlines()])


def put(text: str, name: str, table: str) -> str:
    block = re.compile(f"<!-- table:{name} -->\n.*?<!-- /table -->", re.DOTALL)
    return block.sub(lambda _: f"<!-- table:{name} -->\n{table}\n<!-- /table -->", text)


if __name__ == "__main__":
    PAGE.write_text(put(put(PAGE.read_text(), "headline", "\n".join(headline())), "planned", measured()))
