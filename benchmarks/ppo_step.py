"""A full step of PPO by QLoRA, four roles on one base in NF4, on one GPU: `python benchmarks/ppo_step.py`.

The base has the shape of a model of 8B and random weights (on_device.py); on it are the policy's, the value's and the
reward's adapters, and with all of them off it is the reference. Layers are checkpointed, sequences packed. The phases
are those of ppo.py. For each: seconds, the bytes that were held before it, and their peak, beside that of its plan
(`fastpost plan ppo`). On a GPU bytes are of torch's allocator; on a CPU of live tensors, by the events of torch's
allocator, the recording of which takes time.

A run is wrong, and shows no number, if the policy's first log-probabilities are not the reference's to the bit, if the
reference's have moved in the end, if something that trains has not, or if a loss is not finite.

--tiny runs all of this on a small model, on a CPU in seconds. --largest goes on from 8B to 14B, 32B and 70B, then to
ever more layers of 70B's, until the GPU's memory is too small.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from contest import RESULTS
from harness import Machine, machine
from on_device import SHAPES, Shape, config_of, four_bit_model
from ppo import Step, Work, adamw_8bit, four_roles, logp_of, prompts_of, step
from roles import live_bytes, most_allocated, quiet

from fastpost.models.roles import Roles
from fastpost.planning.command import quietly
from fastpost.planning.config import PlannedPpo
from fastpost.planning.plans import surveyed

NEEDED = ("transformers", "peft", "bitsandbytes")
TINY = Work(prompts=4, prompt_tokens=12, completion_tokens=6, minibatch_tokens=32, lora_r=4, learning_rate=1e-3)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Phase:
    step: int | None  # None: before the first
    name: str
    seconds: float
    held_bytes: int  # before
    peak_bytes: int
    planned_bytes: int | None = None  # of its peak; None: there is no plan of it


def metered(phases: list[Phase], device: torch.device, at: int | None, name: str, run: Callable[[], Result]) -> Result:
    """What `run` gives; what it cost goes to `phases`."""
    said: list[Result] = []
    took: list[float] = []

    def timed() -> None:
        start = time.perf_counter()
        said.append(run())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        timed()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        held = live_bytes()
        peak = held + most_allocated(timed)
    phases.append(Phase(at, name, took[0], held, peak))
    return said[0]


# ---- a run ----


def complaint(roles: Roles, steps: Sequence[Step]) -> str:
    """Why the run is not to be believed; empty where it is."""
    first = steps[0].packs[0]
    fresh, reference = first.batch.old_logp, first.batch.ref_logp
    assert roles.value.scalar is not None
    zero_at_first = [*roles.policy.parameters(), roles.value.scalar.weight]  # or at random, which is not zero either
    found = {
        "the fresh policy is not its reference": not torch.equal(fresh, reference),
        "the reference has moved": not torch.equal(logp_of(roles, "reference", first), reference),
        "something that trains has not moved": not all(bool(tensor.any()) for tensor in zero_at_first),
        "a loss is not finite": not all(each.finite for each in steps),
    }
    return "; ".join(what for what, so in found.items() if so)


def measured(shape: Shape, work: Work, steps: int, device: torch.device) -> dict[str, Any]:
    """A run of so many steps. The first warms up, and makes the moments of AdamW."""
    phases: list[Phase] = []
    meter = partial(metered, phases, device)
    torch.manual_seed(0)
    base = meter(None, "base", lambda: four_bit_model(shape, device))
    roles = meter(None, "roles", lambda: four_roles(base, work.lora_r))
    optimizer, done = adamw_8bit(roles, work.learning_rate), []
    for i in range(steps):
        prompts = prompts_of(work, shape.vocab, seed=i)
        done.append(step(roles, optimizer, prompts, work, seed=i, meter=partial(meter, i)))
    wrong = complaint(roles, done)
    packs = done[-1].packs
    facts = {
        "status": "WRONG" if wrong else "ok",
        "reason": wrong,
        "trained_parameters": sum(p.numel() for tensors in roles.trainable().values() for p in tensors),
        "packs": len(packs),
        "tokens": sum(pack.input_ids.numel() for pack in packs),
        "completion_tokens": sum(len(pack.batch.kept) for pack in packs),
    }
    if wrong:
        return facts
    peak, plans = max(phase.peak_bytes for phase in phases if phase.step is not None), planned(shape, work, device)
    beside = [asdict(replace(phase, planned_bytes=plans.get(phase.name))) for phase in phases]
    return facts | {"peak_bytes": peak, "planned_bytes": max(plans.values()), "phases": beside}


def growing() -> Iterator[tuple[str, Shape]]:
    """The shapes from 8B on, then ever more layers of the last."""
    yield from ((name, shape) for name, shape in SHAPES.items() if name != "tiny")
    for layers in itertools.count(120, 40):
        yield f"70B's, {layers} layers", replace(SHAPES["70B"], layers=layers)


def fitting(
    shapes: Iterable[tuple[str, Shape]], run: Callable[[Shape], dict[str, Any]]
) -> Iterator[tuple[str, Shape, dict[str, Any]]]:
    """What each run says, until one finds no memory."""
    for name, shape in shapes:
        try:
            found = run(shape)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            print(f"{name} does not fit: {str(error).splitlines()[0]}", flush=True)
            return
        yield name, shape, found
        gc.collect()
        torch.cuda.empty_cache()


def planned(shape: Shape, work: Work, device: torch.device) -> dict[str, int]:
    """The peak of each phase by its plan, which knows the longest prompt alone, and packs as full as they may be."""
    with tempfile.TemporaryDirectory() as folder, quietly():
        config_of(shape).save_pretrained(folder)
        survey = surveyed(
            PlannedPpo(
                model=folder,
                device=device.type,  # type: ignore[arg-type]  # cpu or cuda
                dtype="bfloat16",
                bf16=True,
                lora_r=work.lora_r,
                load_in_4bit=True,
                optim="adamw_8bit",
                max_prompt_length=work.prompt_tokens,
                max_completion_length=work.completion_tokens,
                per_device_train_batch_size=work.prompts,
                max_tokens_per_batch=work.minibatch_tokens,
                generation_batch_size=work.prompts,
            )
        )
        of_moments = {moment.name: moment.total for moment in survey.moments}
    rollout = max(of_moments["rollout: prompts"], of_moments["rollout: completions"])
    passes = dict.fromkeys(("reward", "logp", "values"), of_moments["reference"])
    found = {**passes, "updates": max(of_moments["training"], of_moments["step"])}
    return found if work.completions == "given" else found | {"rollout": rollout}


# ---- the program ----


def table(name: str, line: dict[str, Any]) -> str:
    """Of the last step."""
    if line["status"] != "ok":
        return f"{name}: WRONG: {line['reason']}"
    last = max(phase["step"] for phase in line["phases"] if phase["step"] is not None)
    shown = [phase for phase in line["phases"] if phase["step"] in (None, last)]
    seconds = sum(phase["seconds"] for phase in shown if phase["step"] == last)
    tokens = f"{line['tokens']} tokens in {line['packs']} packs, {line['completion_tokens']} of them of completions"
    rows = [f"{name}: {tokens}; a step {seconds:.2f} s, peak {line['peak_bytes'] / 1e6:.1f} MB"]
    rows.append(f"{'phase':<12}{'seconds':>10}{'held before, MB':>18}{'peak, MB':>12}{'planned, MB':>14}")
    for phase in shown:
        held, peak, plan = phase["held_bytes"] / 1e6, phase["peak_bytes"] / 1e6, phase["planned_bytes"]
        by_plan = "" if plan is None else f"{plan / 1e6:.1f}"
        rows.append(f"{phase['name']:<12}{phase['seconds']:>10.2f}{held:>18.1f}{peak:>12.1f}{by_plan:>14}".rstrip())
    return "\n".join(rows)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A step of PPO with four roles on one base in NF4: time and memory.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shape", default="8B", choices=[name for name in SHAPES if name != "tiny"])
    which.add_argument("--tiny", action="store_true", help="a small model and short texts")
    which.add_argument("--largest", action="store_true", help="from 8B on, the largest that fits")
    parser.add_argument("--steps", type=int, default=2, help="the last is shown; the first warms up")
    parser.add_argument("--completions", choices=("generated", "given"), help="default: generated")
    for name, default in asdict(Work()).items():
        if name != "completions":
            parser.add_argument(f"--{name}", type=type(default), help=f"{default}; with --tiny {getattr(TINY, name)}")
    parser.add_argument("--output", type=Path, help="JSON lines; benchmarks/results/ppo_step/<device>-<date>.jsonl")
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.tiny:
        parser.error("models of 8B and more want a GPU: --tiny runs the same step on a CPU")
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    return options


def output_of(options: argparse.Namespace, where: Machine, now: datetime) -> Path:
    slug = re.sub(r"\W+", "-", "cpu" if where.device == "cpu" else where.name).strip("-").lower()
    found = options.output or RESULTS / "ppo_step" / f"{slug}-{now:%Y-%m-%d}.jsonl"
    found.parent.mkdir(parents=True, exist_ok=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"nothing was run: {', '.join(missing)} is not installed")
        return 0
    quiet()
    given = {name: value for name in asdict(Work()) if (value := getattr(options, name)) is not None}
    work, device = replace(TINY if options.tiny else Work(), **given), torch.device(options.device)
    where, now = machine(device), datetime.now(UTC)
    output = output_of(options, where, now)
    chosen = "tiny" if options.tiny else options.shape
    shapes = growing() if options.largest else [(chosen, SHAPES[chosen])]
    run = partial(measured, work=work, steps=options.steps, device=device)
    setup = {"bench": "ppo_step", "run": now.isoformat(timespec="seconds"), "machine": asdict(where)}
    names, wrong = [], False
    for name, shape, found in fitting(shapes, run):
        line = {"setup": setup, "model": name, "shape": asdict(shape), "work": asdict(work), **found}
        with output.open("a", encoding="utf-8") as file:  # one that is ended by a time limit leaves what it has
            file.write(json.dumps(line) + "\n")
        print(table(name, line), flush=True)
        names.append(name)
        wrong |= found["status"] != "ok"
    if options.largest:
        print(f"the largest that fits: {names[-1] if names else 'none'}")
    print(f"written to {output}")
    return int(wrong or not names)


if __name__ == "__main__":
    sys.exit(main())
