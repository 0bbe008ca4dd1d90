"""checkpoint-N: the model after N steps, the optimizer's moments, and the little that (seed, N) does not already say.

Tensors are safetensors, the rest JSON. A checkpoint is written aside and renamed, so it is whole or absent.
N steps straight and k steps, then a resume to N, give the same bits on a CPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from fastpost.models.saving import save_weights, written_aside
from fastpost.trainers.build import build
from fastpost.trainers.config import Training
from fastpost.trainers.loop import seed_step, the_device
from fastpost.trainers.metrics import say
from fastpost.trainers.optimizers import adamw, load_state_tensors, state_tensors

# Fields that may differ on resume without a word: they do not change what is computed in a step.
FREE = {"output_dir", "resume_from_checkpoint", "eval_dataset"}
FREE |= {"logging_steps", "eval_steps", "save_steps", "save_total_limit"}
# Fields that move every learning rate, unless that is constant.
LENGTH = ("max_steps", "num_train_epochs")
# Fields that say which tensors there are, and what a base rounds to: a checkpoint fits no others.
SHAPING = ("lora_r", "lora_target_modules", "lora_modules_to_save", "use_dora", "optim")
SHAPING += ("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    model: Any
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    step: int = 0
    num_tokens: int = 0


def check_output_dir(config: Training) -> None:
    """A new run must not mix its files with those of an old one."""
    output = Path(config.output_dir)
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"output_dir {config.output_dir} cannot be made: {there} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"output_dir {config.output_dir} cannot be written: no permission in {there}")
    if config.resume_from_checkpoint is not None:
        return
    finished = any((output / name).exists() for name in ("config.json", "adapter_config.json"))
    if not finished and not checkpoints(output) and (output / "metrics.jsonl").exists():
        say(f"output_dir {config.output_dir} holds a run that left no checkpoint: it is begun again")
    elif (output / "metrics.jsonl").exists() or checkpoints(output):
        raise ValueError(
            f"output_dir {config.output_dir} holds a run already: continue it with --resume_from_checkpoint latest, "
            "or choose another output_dir"
        )


def start(config: Training) -> Start:
    """The model on its device with its optimizer, fresh or as a checkpoint left them."""
    from safetensors.torch import load_file

    found = find_checkpoint(config)
    state = {} if found is None else json.loads((found / "state.json").read_text(encoding="utf-8"))
    for name in SHAPING if state else ():
        now = _plain(config)[name]
        then = state["config"].get(name, now)
        if now != then:
            raise ValueError(f"{name} is {now!r} and was {then!r} in {found}: a resumed run must have the same")
    seed_step(config.seed, -1)  # adapters begin at random
    # An adapter's checkpoint holds the adapter alone; its base is still where it was.
    model, tokenizer = build(config, config.model if config.trains_adapter or found is None else str(found))
    if found is not None and config.trains_adapter:
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(found), device="cpu"))
    model.to(the_device()).train()
    optimizer = adamw(model, config)
    if found is None:
        return Start(model, tokenizer, optimizer)
    load_state_tensors(optimizer, load_file(found / "optimizer.safetensors"))
    for name, then in state["config"].items():
        now = _plain(config).get(name)
        if now != then and not (name in LENGTH and config.lr_scheduler_type == "constant"):
            say(f"resuming with another {name}: {now!r}, in the checkpoint {then!r}")
    return Start(model, tokenizer, optimizer, state["step"], state["num_tokens"])


def save(config: Training, state: Start, step: int, num_tokens: int) -> None:
    """Writes checkpoint-<step>, then removes the oldest beyond save_total_limit."""
    from safetensors.torch import save_file

    output = Path(config.output_dir)
    with written_aside(output / f"checkpoint-{step}") as aside:
        save_weights(state.model, aside)
        state.tokenizer.save_pretrained(aside)
        save_file(state_tensors(state.optimizer), aside / "optimizer.safetensors")
        facts = {"step": step, "num_tokens": num_tokens, "config": _plain(config)}
        (aside / "state.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    if config.save_total_limit is not None:
        for old in checkpoints(output)[: -config.save_total_limit]:
            shutil.rmtree(old)


def set_later_aside(output: Path, step: int) -> None:
    """Renames the checkpoints after `step`: a run resumed there goes another way, and has the later numbers itself.

    Left among its own, they would be the 'latest' ones, and outlive those that it writes by save_total_limit.
    """
    for path in checkpoints(output):
        if _step_of(path) > step:
            names = (path.with_name(f"{path.name}.abandoned-{i}") for i in count(1))
            aside = next(name for name in names if not name.exists())
            path.rename(aside)
            say(f"resuming before {path}: it is now {aside.name}, and counts no more")


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def _plain(config: Training) -> dict[str, Any]:
    """The fields that decide what a step computes, as JSON gives them back."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    return json.loads(json.dumps(fields))


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step_of)


def find_checkpoint(config: Training) -> Path | None:
    """The checkpoint to resume from, if any is asked for."""
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted == "latest":
        found = checkpoints(Path(config.output_dir))
        if not found:
            raise ValueError(f"output_dir {config.output_dir} holds no checkpoint-N to resume from")
        return found[-1]
    if not (Path(wanted) / "state.json").is_file():
        raise ValueError(f"resume_from_checkpoint {wanted!r} is no checkpoint: it has no state.json")
    return Path(wanted)
