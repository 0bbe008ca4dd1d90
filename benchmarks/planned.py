"""Plans beside what real steps take: `python benchmarks/planned.py --output FILE.jsonl`.

One line for each run of a random model of the Llama family on a CPU, by the trainers' own functions (of DPO, as one
would): the plan, made from the config alone, and what `planned_real` measures, both with the parts at the peak. No
number of a plan comes from these runs. Where a peak is off by more than 10 % of the measured one, or the largest
part of the plan by more than 15 %, the program fails.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from harness import machine
from planned_real import Measured, measured

from fastpost.planning.config import Planned, PlannedDpo, PlannedGrpo, PlannedSft
from fastpost.planning.plans import surveyed

TOTAL, LARGEST = 0.10, 0.15  # what a plan may be off by
APART = ("weights", "adapters", "other models", "optimizer", "gradients", "KV cache")


@dataclass(frozen=True)
class Shape:
    hidden: int  # D
    layers: int
    vocab: int  # V
    rows: int = 2  # sequences of a microbatch
    shared_heads: int = 1  # query heads to each key and value
    tied: bool = False


SAID = 16  # tokens of each completion of a rollout
BROAD, DEEP = Shape(768, 8, 32_000), Shape(512, 8, 8192)
TIED = Shape(512, 4, 65_536, shared_heads=4, tied=True)
SPOKEN = Shape(512, 8, 8192, rows=64)


@dataclass(frozen=True)
class Run:
    name: str
    verb: Literal["sft", "dpo", "grpo", "rollout"]
    length: int  # tokens of a sequence
    shape: Shape
    fields: Mapping[str, Any] = field(default_factory=dict)


LORA, KL, KEPT = {"lora_r": 16}, {"beta": 0.04}, {"gradient_checkpointing": False}
EACH = (
    Run("sft, full", "sft", 1024, DEEP),
    Run("sft, full, long", "sft", 2048, DEEP),
    Run("sft, LoRA", "sft", 512, BROAD, LORA),
    Run("sft, LoRA, long", "sft", 1024, BROAD, LORA),
    Run("dpo, full, all kept", "dpo", 512, DEEP, KEPT),
    Run("dpo, full, all kept, long", "dpo", 1024, DEEP, KEPT),
    Run("dpo, LoRA", "dpo", 512, BROAD, LORA),
    Run("dpo, LoRA, long", "dpo", 1024, BROAD, LORA),
    Run("grpo, full, all kept", "grpo", 512, DEEP, KL | KEPT),
    Run("grpo, full, all kept, long", "grpo", 1024, DEEP, KL | KEPT),
    Run("grpo, LoRA", "grpo", 512, BROAD, LORA | KL),
    Run("grpo, LoRA, long", "grpo", 1024, BROAD, LORA | KL),
    Run("sft, full, tied, shared heads, two microbatches", "sft", 512, TIED, {"gradient_accumulation_steps": 2}),
    Run("sft, full, 8-bit AdamW", "sft", 256, BROAD, {"optim": "adamw_8bit"}),
    Run("rollout, LoRA", "rollout", 192, SPOKEN, LORA),
)
RUNS = {run.name: run for run in EACH}


def write_config(shape: Shape, directory: Path) -> Path:
    from transformers import LlamaConfig

    heads = max(1, shape.hidden // 64)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=8 * shape.hidden // 3 // 64 * 64,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // shape.shared_heads,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    return directory / "config.json"


def config_of(run: Run, model: Path) -> Planned:
    same: dict[str, Any] = {"model": str(model), "device": "cpu", "output_dir": ".", **run.fields}
    rows = run.shape.rows
    if run.verb == "sft":
        return PlannedSft(max_length=run.length, per_device_train_batch_size=rows, **same)
    if run.verb == "dpo":
        return PlannedDpo(max_length=run.length, per_device_train_batch_size=rows // 2, **same)
    prompt = run.length - SAID if run.verb == "rollout" else run.length // 4
    lengths = {"max_prompt_length": prompt, "max_completion_length": run.length - prompt}
    return PlannedGrpo(num_generations=rows, per_device_train_batch_size=rows, **lengths, **same)


def planned(config: Planned, *, rollout: bool) -> dict[str, Any]:
    """Of the moments that are measured."""
    survey = surveyed(config)
    moments = [m for m in survey.moments if m.name.startswith("rollout") == rollout]
    peak = max(moments, key=lambda moment: moment.total)
    parts = {name: peak.parts[name] for name in APART if name in peak.parts}
    parts["activations and the like"] = peak.total - sum(parts.values())
    totals = {moment.name: moment.total for moment in moments}
    return {"peak": peak.total, "live": survey.rests, "moment": peak.name, "moments": totals, "parts": parts}


def errors(plan: Mapping[str, Any], real: Measured) -> dict[str, float]:
    """Relative, of the peak, of the largest part of the plan, and of what a step adds to what rests."""
    part = max(plan["parts"], key=plan["parts"].get)
    return {
        "peak": plan["peak"] / real.peak - 1,
        "largest part": plan["parts"][part] / max(1, real.parts.get(part, 0)) - 1,
        "added": (plan["peak"] - plan["live"]) / (real.peak - real.live) - 1,
    }


def line(run: Run, directory: Path) -> dict[str, Any]:
    config, rollout = config_of(run, write_config(run.shape, directory)), run.verb == "rollout"
    plan = planned(config, rollout=rollout)
    real = measured(config, run.shape.rows, run.length, rollout=rollout)
    tokens = run.shape.rows * run.length
    return {"run": run.name, "tokens": tokens, "plan": plan, "measured": asdict(real), "error": errors(plan, real)}


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """What docs/memory.md shows of a run."""
    columns = ("", "tokens", "at the peak", "planned", "measured", "off by", "largest part", "off by")
    rows = [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|---" * len(columns) + "|"]
    for each in lines:
        parts, off = each["plan"]["parts"], each["error"]
        sizes = " | ".join(f"{each[which]['peak'] / 1e6:.0f} MB" for which in ("plan", "measured"))
        largest = f"{max(parts, key=parts.get)} | {off['largest part']:+.1%}"
        moment = f"{each['run']} | {each['tokens']} | {each['plan']['moment']}"
        rows.append(f"| {moment} | {sizes} | {off['peak']:+.1%} | {largest} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plans beside what real steps take.")
    parser.add_argument("--output", type=Path, required=True, help="a file of JSON lines, appended to")
    parser.add_argument("--run", choices=list(RUNS), action="append", help="default: each of them")
    options = parser.parse_args()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    setup = {"bench": "planned", "run": now, "machine": asdict(machine(torch.device("cpu")))}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for run in (RUNS[name] for name in options.run or RUNS):
        with tempfile.TemporaryDirectory() as folder:
            found.append({"setup": setup | {"shape": asdict(run.shape)}, **line(run, Path(folder))})
        print(table(found[-1:]).splitlines()[-1], flush=True)
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found[-1]) + "\n")
    off = [x["run"] for x in found if abs(x["error"]["peak"]) > TOTAL or abs(x["error"]["largest part"]) > LARGEST]
    if off:
        raise SystemExit(f"planned too far from what was measured: {', '.join(off)}")


if __name__ == "__main__":
    main()
