"""Plans beside what real steps take: `python benchmarks/planned.py --output FILE.jsonl`.

One line for each run of a random model of the Llama family on a CPU: the plan, made from the config alone, and the
second of two optimizer steps, by the trainers' own functions (of DPO, which has no trainer, as one would).
live   bytes of all tensors before the step
peak   those, and the most that the step allocates above them, by the events of torch's allocator; not RSS
parts  what lies in parameters and in the optimizer's state
No number of a plan comes from these runs. Where a peak is off by more than 10 % of the measured one, or the largest
part by more than 15 %, the program fails.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import machine
from roles import live_bytes, most_allocated

from fastpost import Head, fused_loss, linear_logprobs, losses
from fastpost.data import Prompt
from fastpost.models import attention
from fastpost.models.lora import with_lora
from fastpost.models.trunk import hidden_states
from fastpost.packing import Example, Packed, pack
from fastpost.packing.subsets import with_known
from fastpost.planning.config import Planned, PlannedDpo, PlannedGrpo, PlannedSft
from fastpost.planning.fit import surveyed
from fastpost.rollout import Completion
from fastpost.trainers import policy, sft
from fastpost.trainers.build import adapter_of
from fastpost.trainers.episodes import counts, episodes, packs_of
from fastpost.trainers.loop import apply_gradients
from fastpost.trainers.objectives import of_grpo
from fastpost.trainers.optimizers import adamw
from fastpost.trainers.reference import Reference
from fastpost.trainers.rollouts import Rollouts
from fastpost.trainers.start import Parts, Start

TOTAL, LARGEST = 0.10, 0.15  # what a plan may be off by


@dataclass(frozen=True)
class Shape:
    hidden: int = 768  # D
    layers: int = 8
    vocab: int = 32_000  # V
    rows: int = 4  # sequences of a microbatch


# (name, verb, tokens of a sequence, fields)
RUNS: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("sft, full", "sft", 256, {}),
    ("sft, full, long", "sft", 512, {}),
    ("sft, full, two microbatches", "sft", 256, {"gradient_accumulation_steps": 2}),
    ("sft, full, 8-bit AdamW", "sft", 256, {"optim": "adamw_8bit"}),
    ("sft, LoRA", "sft", 256, {"lora_r": 16}),
    ("sft, LoRA, long", "sft", 512, {"lora_r": 16}),
    ("sft, LoRA, all kept", "sft", 256, {"lora_r": 16, "gradient_checkpointing": False}),
    ("dpo, full", "dpo", 256, {}),
    ("dpo, LoRA", "dpo", 256, {"lora_r": 16}),
    ("grpo, full", "grpo", 256, {"beta": 0.04}),
    ("grpo, LoRA", "grpo", 512, {"lora_r": 16, "beta": 0.04}),
)


def write_config(shape: Shape, directory: Path) -> Path:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=8 * shape.hidden // 3 // 64 * 64,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.hidden // 64),
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    return directory / "config.json"


def config_of(verb: str, shape: Shape, length: int, model: Path, fields: Mapping[str, Any]) -> Planned:
    same: dict[str, Any] = {"model": str(model), "device": "cpu", "output_dir": ".", **fields}
    if verb == "sft":
        return PlannedSft(max_length=length, per_device_train_batch_size=shape.rows, **same)
    if verb == "dpo":
        return PlannedDpo(max_length=length, per_device_train_batch_size=shape.rows // 2, **same)
    prompt = length // 4
    lengths = {"max_prompt_length": prompt, "max_completion_length": length - prompt}
    return PlannedGrpo(num_generations=shape.rows, per_device_train_batch_size=shape.rows, **lengths, **same)


# ---- the real thing ----


def built(config: Planned) -> Any:
    """As `fastpost.trainers.build` makes it, but for a file of weights and a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model), dtype=torch.float32)
    model.set_attn_implementation(attention.register())
    if config.lora_r:
        model = with_lora(model, adapter_of(config))
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def examples(rows: int, length: int, vocab: int) -> list[Example]:
    ids = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [Example(row, [True] * length) for row in ids]


def gradients(start: Start, config: Planned, shape: Shape, length: int) -> Callable[[], object]:
    """What adds the gradient of one step."""
    rows, model = examples(shape.rows * config.gradient_accumulation_steps, length, shape.vocab), start.model
    if isinstance(config, PlannedSft):
        return lambda: sft.backward(model, rows, config)
    if isinstance(config, PlannedDpo):
        reference = model if config.lora_r else copy.deepcopy(model).requires_grad_(False)
        return lambda: dpo(model, reference, pack(rows))
    assert isinstance(config, PlannedGrpo)
    reference = Reference.of(start, config)
    prompts = [Prompt("", row.input_ids[: length // 4], {}) for row in rows]
    completions = [Completion(row.input_ids[length // 4 :], True) for row in rows]
    rollouts = Rollouts(prompts, completions, [], None, {})  # type: ignore[arg-type]  # nobody asks what they scored
    advantages = torch.linspace(-1, 1, len(rows))
    stage: Any = SimpleNamespace(shared=False, config=config)

    def grpo() -> None:
        whole = episodes(rollouts, config)
        whole = with_known(whole, advantage=whole.batch.spread(advantages))
        packs = [reference.scored(packed) for packed in packs_of(whole, of_grpo(config), stage, rollouts)]
        policy.backward(model, packs, of_grpo(config), int(counts(whole).sum()), config)

    return grpo


def dpo(model: Any, reference: Any, packed: Packed) -> None:
    """Pairs are adjacent; the reference is the model with its adapter off, or a frozen copy."""
    off = model.disable_adapter() if reference is model else nullcontext()
    reference.eval()
    with torch.no_grad(), off:
        hidden = hidden_states(reference, packed)[0]
        ref_logp = linear_logprobs(hidden, Head.of(reference), packed.batch.target)
    del hidden
    model.train()
    batch = replace(packed.batch, ref_logp=ref_logp)
    loss = fused_loss(losses.dpo, hidden_states(model, packed), Head.of(model), batch)
    assert isinstance(loss, torch.Tensor)
    loss.backward()


def measured(config: Planned, shape: Shape, length: int) -> dict[str, Any]:
    before = live_bytes()
    model = built(config)
    parts = Parts.of(model)
    optimizer = adamw(parts.parameters, config)
    run = gradients(Start(parts, optimizer), config, shape, length)

    def step() -> None:
        run()
        apply_gradients(parts.parameters, optimizer, 1e-5, 1.0)

    step()
    live = live_bytes() - before
    above = most_allocated(step)
    frozen = not config.trains_adapter
    weights = sum(p.numel() * p.itemsize for p in model.parameters() if frozen or not p.requires_grad)
    trained = sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad)
    state = {s.data_ptr(): s.nbytes() for s in state_storages(optimizer)}
    parts = {"weights": weights, "adapters": 0 if frozen else trained, "optimizer": sum(state.values())}
    return {"peak": live + above, "live": live, "parts": {name: size for name, size in parts.items() if size}}


def state_storages(optimizer: torch.optim.Optimizer) -> Iterator[torch.UntypedStorage]:
    for state in optimizer.state.values():
        for value in state.values():
            for x in value.values() if isinstance(value, Mapping) else (value,):
                if isinstance(x, torch.Tensor):
                    yield x.untyped_storage()


# ---- beside its plan ----


def planned(config: Planned) -> dict[str, Any]:
    """Of the moments that are measured: rollouts are not."""
    survey = surveyed(config)
    moments = [m for m in survey.moments(survey.demand.tokens) if not m.name.startswith("rollout")]
    peak = max(moments, key=lambda moment: moment.total)
    totals = {moment.name: moment.total for moment in moments}
    rests = sum(survey.resting.values())
    return {"peak": peak.total, "live": rests, "moment": peak.name, "moments": totals, "parts": dict(peak.parts)}


def errors(plan: Mapping[str, Any], real: Mapping[str, Any]) -> dict[str, float]:
    """Relative, of the peak, of the largest part that is measured by itself, and of what a step adds to what rests."""
    part = max(real["parts"], key=real["parts"].get)
    return {
        "peak": plan["peak"] / real["peak"] - 1,
        "largest part": plan["parts"].get(part, 0) / real["parts"][part] - 1,
        "added": (plan["peak"] - plan["live"]) / (real["peak"] - real["live"]) - 1,
    }


def line(name: str, shape: Shape, directory: Path) -> dict[str, Any]:
    verb, length, fields = next((verb, length, fields) for n, verb, length, fields in RUNS if n == name)
    config = config_of(verb, shape, length, write_config(shape, directory), fields)
    plan, real = planned(config), measured(config, shape, length)
    return {"run": name, "tokens": shape.rows * length, "plan": plan, "measured": real, "error": errors(plan, real)}


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """What docs/memory.md shows of a run."""
    rows = ["| | tokens | in | planned | measured | off by | of what the step adds |", "|---|---|---|---|---|---|---|"]
    for each in lines:
        sizes = " | ".join(f"{each[which]['peak'] / 1e6:.0f} MB" for which in ("plan", "measured"))
        off = " | ".join(f"{each['error'][what]:+.1%}" for what in ("peak", "added"))
        rows.append(f"| {each['run']} | {each['tokens']} | {each['plan']['moment']} | {sizes} | {off} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plans beside what real steps take.")
    parser.add_argument("--output", type=Path, required=True, help="a file of JSON lines, appended to")
    parser.add_argument("--run", choices=[name for name, *_ in RUNS], action="append", help="default: each of them")
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = vars(parser.parse_args())
    shape = Shape(**{name: options[name] for name in asdict(Shape())})
    setup = {
        "bench": "planned",
        "run": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine(torch.device("cpu"))),
        "shape": asdict(shape),
    }
    options["output"].parent.mkdir(parents=True, exist_ok=True)
    found = []
    for name in options["run"] or [name for name, *_ in RUNS]:
        with tempfile.TemporaryDirectory() as folder:
            found.append({"setup": setup, **line(name, shape, Path(folder))})
        print(table(found[-1:]).splitlines()[-1], flush=True)
        with options["output"].open("a", encoding="utf-8") as file:
            file.write(json.dumps(found[-1]) + "\n")
    off = [x["run"] for x in found if abs(x["error"]["peak"]) > TOTAL or abs(x["error"]["largest part"]) > LARGEST]
    if off:
        raise SystemExit(f"planned too far from what was measured: {', '.join(off)}")


if __name__ == "__main__":
    main()
