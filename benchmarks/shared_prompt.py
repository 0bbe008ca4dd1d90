"""A group's prompt once, against before each completion: `python benchmarks/shared_prompt.py`.

One GRPO step on one group, forward and backward through trunk and head, of a random Qwen3 with all weights trained: the
same rows as a plain pack and as a shared one. A pack whose gradient is further from float64 than twice the plain
pack's, and eps beyond that, is wrong and has no speed.

  tokens    that go through the trunk: G (P + R) and P + G R
  x fewer   tokens of the plain pack over those of the shared one; `x faster` is to be held against it
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contest import RESULTS
from harness import Machine, interleaved, machine, peak_bytes
from torch import Tensor

import fastpost as fp
from fastpost import losses
from fastpost.models import attention
from fastpost.models.trunk import hidden_states
from fastpost.packing import Example, Packed, pack
from fastpost.shared_prompt import SharedPack, share_prompts

MODEL = {
    "vocab_size": 1024,  # so that the head has the share of the work that it has in a model of 8B
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
CASES = ((128, 256, 8), (512, 128, 8), (1024, 64, 8))  # tokens of the prompt, of a completion, completions


@dataclass(frozen=True)
class Line:
    """One measurement."""

    machine: Machine
    run: str  # when it was started, ISO
    bench: str
    model: dict[str, int]
    dtype: str
    prompt: int
    completion: int
    group: int
    provider: str  # repeated or shared
    tokens: int
    error: float  # of the gradient of all weights, against float64, relative
    status: str  # ok or WRONG; only what is ok has a speed
    seconds: float | None = None
    peak_bytes: int | None = None  # above the weights and their gradients


def made(dtype: torch.dtype) -> Any:
    """The model, weights of which are large enough that the attention is not uniform."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    attention.register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**MODEL), attn_implementation=attention.NAME)
    return model.to(dtype)


def group(prompt: int, completion: int, size: int) -> Packed:
    """One prompt before each of its completions, with an advantage each."""
    said = torch.randint(MODEL["vocab_size"], (prompt,)).tolist()
    rows = [said + torch.randint(MODEL["vocab_size"], (completion,)).tolist() for _ in range(size)]
    examples = [Example(row, [i >= prompt for i in range(len(row))]) for row in rows]
    return pack(examples, advantage=torch.linspace(-1, 1, size))


def step(model: Any, packed: Packed | SharedPack) -> list[Tensor]:
    """The gradient of every weight."""
    model.zero_grad(set_to_none=True)
    fp.fused_loss(losses.grpo, hidden_states(model, packed), fp.Head.of(model), packed.batch).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def distance(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Relative, in the Frobenius norm of all."""
    apart = sum(float((a.double() - b.double()).norm()) ** 2 for a, b in zip(ours, truth, strict=True))
    return (apart / sum(float(b.double().norm()) ** 2 for b in truth)) ** 0.5


def checked(model: Any, packs: dict[str, Packed | SharedPack]) -> dict[str, tuple[float, bool]]:
    """The error of each, and whether it is one that the plain pack's rounding explains."""
    truth = step(made(torch.float64), packs["repeated"])
    errors = {name: distance(step(model, packed), truth) for name, packed in packs.items()}
    allowed = 2 * errors["repeated"] + torch.finfo(torch.float32).eps
    return {name: (error, error <= allowed) for name, error in errors.items()}


def measure(case: tuple[int, int, int], repeats: int, run: str) -> list[Line]:
    model, plain, device = made(torch.float32), group(*case), torch.device("cpu")
    packs: dict[str, Packed | SharedPack] = {"repeated": plain, "shared": share_prompts(plain, case[2])}
    found = checked(model, packs)
    runs: dict[str, Callable[[], list[Tensor]]] = {
        name: partial(step, model, packed) for name, packed in packs.items() if found[name][1]
    }
    seconds = interleaved(runs, repeats, device)
    peaks = {name: peak_bytes(each, lambda gradients: gradients, device) for name, each in runs.items()}
    shared = (machine(device), run, "shared_prompt", MODEL, "float32", *case)
    return [
        Line(
            *shared,
            provider=name,
            tokens=packed.input_ids.numel(),
            error=found[name][0],
            status="ok" if found[name][1] else "WRONG",
            seconds=seconds.get(name),
            peak_bytes=peaks.get(name),
        )
        for name, packed in packs.items()
    ]


def told(lines: Sequence[Line]) -> str:
    """A case in a line."""
    plain, shared = lines
    case = f"P {plain.prompt}, R {plain.completion}, G {plain.group}"
    tokens = f"{plain.tokens} -> {shared.tokens} tokens, x {plain.tokens / shared.tokens:.2f} fewer"
    if not (plain.seconds and shared.seconds):
        return f"{case}: {tokens}; WRONG: error {shared.error:.1e}, that of the plain pack is {plain.error:.1e}"
    speed = f"{plain.seconds:.3f} -> {shared.seconds:.3f} s, x {plain.seconds / shared.seconds:.2f} faster"
    memory = f"{(plain.peak_bytes or 0) / 1e6:.0f} -> {(shared.peak_bytes or 0) / 1e6:.0f} MB"
    return f"{case}: {tokens}; {speed}; peak {memory}; error {plain.error:.1e} -> {shared.error:.1e}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time, memory and error of a prompt that a group shares, on the CPU.")
    parser.add_argument("--case", type=int, nargs=3, metavar=("P", "R", "G"), help="only this; else three")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--output", type=Path, help="JSON lines; benchmarks/results/shared_prompt/cpu-<date>.jsonl")
    options = parser.parse_args(argv)
    now = datetime.datetime.now().astimezone()
    output = options.output or RESULTS / "shared_prompt" / f"cpu-{now:%Y-%m-%d}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    wrong = False
    for case in [tuple(options.case)] if options.case else CASES:
        lines = measure(case, options.repeats, now.isoformat(timespec="seconds"))
        with output.open("a") as file:
            file.writelines(json.dumps(asdict(line)) + "\n" for line in lines)
        print(told(lines), flush=True)
        wrong |= any(line.status != "ok" for line in lines)
    print(f"written to {output}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
