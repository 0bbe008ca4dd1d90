"""Runs of every verb, a row each, small enough for two processes on a CPU: what they read, and how they are begun."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import talking
import tiny
from calling import rolls_first
from fastpost.rollout.sampler import Generate
from fastpost.trainers.config import Cpo, Distill, Dpo, Grpo, Kto, OnlineDpo, Ppo, Prm, Reinforce, Reward, Rloo, Sft
from fastpost.trainers.distill import distill
from fastpost.trainers.dpo import dpo
from fastpost.trainers.grpo import grpo
from fastpost.trainers.kto import kto
from fastpost.trainers.online_dpo import online_dpo
from fastpost.trainers.ppo import ppo
from fastpost.trainers.prm import prm
from fastpost.trainers.reference_free import cpo
from fastpost.trainers.reinforce import reinforce
from fastpost.trainers.reward import reward
from fastpost.trainers.rloo import rloo
from fastpost.trainers.sft import sft
from fastpost.trainers.zero3 import full_numel

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO, STAGE = {"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_DEEPSPEED_ZERO_STAGE"
BY_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
ENGINES = {"ddp": {}, "fsdp2": FSDP2, "zero1": ZERO | {STAGE: "1"}, "zero2": ZERO | {STAGE: "2"}}
ENGINES |= {"zero3": ZERO | {BY_FILE: "zero3.json"}}
# DeepSpeed leaves gathered what is small, or soon read again, and here all is.
STRICT = {"param_persistence_threshold": 0, "max_reuse_distance": 0, "prefetch_bucket_size": 5000}
ZERO3 = {"zero_optimization": {"stage": 3, **{f"stage3_{name}": value for name, value in STRICT.items()}}}
LORA = {"lora_r": 4, "init_lora_weights": "gaussian"}


@dataclass(frozen=True)
class Case:
    """A verb and what its config says of it."""

    verb: Callable[..., Any]
    config: type
    data: str
    changes: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    model: str = "model"


def capitals(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Prompts with an a or a b have no variance."""
    pairs = zip(prompts, completions, strict=True)
    return [0.0 if {*"ab"} & {*p} else sum("A" <= x <= "Z" for x in text) / 6 for p, text in pairs]


def likes(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Of conversations."""
    return capitals([p[0]["content"] for p in prompts], [said[-1]["content"] for said in completions])


def prefer(prompts: list[str], firsts: list[str], seconds: list[str]) -> list[float]:
    """How probably the first is better."""
    return [(1 + a - b) / 2 for a, b in zip(capitals(prompts, firsts), capitals(prompts, seconds), strict=True)]


def nothing(completions: list[str], **columns: Any) -> list[float]:
    return [0.5] * len(completions)


SAMPLED = {"num_generations": 3, "max_completion_length": 6, "learning_rate": 1e-2, "max_steps": 3}
# A window of 12 rows of 20, then one of 8, which is 3 packs for 2 processes.
ONE_EPOCH = {"num_train_epochs": 1.0, "max_steps": -1}
CAPITALS, TALKS = {"reward_funcs": capitals}, {"reward_funcs": likes}
TAUGHT = {"teacher_model": "teacher"}
BY_BOTH = {"lmbda": 0.5, "max_completion_length": 6, "seed": 1}  # a step on own answers, then one on the data's

PPO = SAMPLED | {"num_generations": 1, "max_steps": 4}
JUDGED = {"reward_model": "judge", "value_model": "judge"}  # whole models, four of them
TWICE = {"max_steps": 8, "learning_rate": 2e-3}  # rounds; large steps would make clipped shares, of whole tokens, jump
VALUE_FIRST = TWICE | {"value_warmup_rounds": 1, "num_ppo_epochs": 2, "num_mini_batches": 2}

CASES = {
    "sft": Case(sft, Sft, "sums", ONE_EPOCH | {"eval_dataset": "sums"}),
    "sft, repacked": Case(sft, Sft, "sums", ONE_EPOCH | {"max_tokens_per_batch": 24, "gradient_checkpointing": True}),
    "sft, LoRA": Case(sft, Sft, "sums", ONE_EPOCH | LORA),
    "dpo": Case(dpo, Dpo, "pairs", ONE_EPOCH),
    "dpo, LoRA": Case(dpo, Dpo, "pairs", ONE_EPOCH | LORA | {"precompute_ref_log_probs": True}),
    "kto": Case(kto, Kto, "labelled", ONE_EPOCH | {"eval_dataset": "labelled"}),
    "cpo": Case(cpo, Cpo, "pairs", ONE_EPOCH),
    "distill": Case(distill, Distill, "sums", ONE_EPOCH | TAUGHT | {"eval_dataset": "sums"} | BY_BOTH),
    "distill, cached": Case(
        distill, Distill, "sums", ONE_EPOCH | {"lmbda": 0.0, "teacher_cache": "cache", "teacher_top_k": 8} | TAUGHT
    ),
    "reward, LoRA": Case(reward, Reward, "pairs", ONE_EPOCH | LORA, model="judge"),
    "prm": Case(prm, Prm, "steps", ONE_EPOCH | {"eval_dataset": "steps"}, model="judge"),
    "prm, LoRA": Case(prm, Prm, "steps", ONE_EPOCH | LORA, model="judge"),
    "online-dpo": Case(online_dpo, OnlineDpo, "prompts", SAMPLED | {"eval_dataset": "prompts"}, CAPITALS),
    "online-dpo, preferred, LoRA": Case(
        online_dpo, OnlineDpo, "prompts", SAMPLED | LORA | {"num_generations": 2}, {"prefer": prefer}
    ),
    "grpo": Case(grpo, Grpo, "prompts", SAMPLED | {"eval_dataset": "prompts"}, CAPITALS),
    "grpo, prompts repeated": Case(grpo, Grpo, "prompts", SAMPLED | {"share_prompts": False}, CAPITALS),
    "grpo, KL, LoRA": Case(
        grpo, Grpo, "prompts", SAMPLED | LORA | {"beta": 0.1, "num_iterations": 2, "max_steps": 4}, CAPITALS
    ),
    "grpo, tools": Case(
        grpo, Grpo, "talks", SAMPLED | {"max_completion_length": 80, "tools": "tools.py:roll"}, TALKS, "talker"
    ),
    "grpo, no variance": Case(grpo, Grpo, "prompts", SAMPLED | {"max_steps": 1}, {"reward_funcs": nothing}),
    "grpo, dense": Case(grpo, Grpo, "prompts", SAMPLED | {"reward": "stepwise:dense"}, CAPITALS),
    "rloo, LoRA": Case(rloo, Rloo, "prompts", SAMPLED | LORA, CAPITALS),
    "reinforce, LoRA": Case(reinforce, Reinforce, "prompts", SAMPLED | LORA, CAPITALS),
    "ppo, LoRA": Case(ppo, Ppo, "prompts", PPO | LORA, CAPITALS),
    "ppo, reward adapter": Case(ppo, Ppo, "prompts", PPO | LORA | {"reward_model": "rewarder"}),
    "ppo": Case(ppo, Ppo, "prompts", PPO | JUDGED | TWICE | {"eval_dataset": "prompts"}, CAPITALS),
    "ppo, value first": Case(ppo, Ppo, "prompts", PPO | LORA | VALUE_FIRST, CAPITALS),
}


def write(folder: Path) -> None:
    """Model directories and the files."""
    made = tiny.model("qwen3", tie_word_embeddings=True)
    made.save_pretrained(folder / "model")
    scores = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    scores.save_pretrained(folder / "judge")
    lora = LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False, modules_to_save=["score"])
    get_peft_model(copy.deepcopy(scores), lora).save_pretrained(str(folder / "rewarder"))
    scores.save_pretrained(folder / "stepwise")
    (folder / "stepwise" / "prm.json").write_text('{"step_separator": "e"}')
    scores.double().save_pretrained(folder / "judge, exact")
    tiny.model("qwen3", seed=1).save_pretrained(folder / "teacher")
    talking.model().save_pretrained(folder / "talker")
    talking.tokenizer().save_pretrained(folder / "talker")
    (folder / "tools.py").write_text(talking.ROLL)
    for name in ("model", "judge", "judge, exact", "stepwise", "teacher"):
        tiny.tokenizer().save_pretrained(folder / name)
    sums = [(f"{a}+{b}=", str(a + b) * (1 + a)) for a in range(5) for b in range(4)]
    rows = {
        "sums": [{"prompt": p, "completion": c} for p, c in sums],
        "pairs": [{"prompt": p, "chosen": c, "rejected": "x" * (1 + i % 4)} for i, (p, c) in enumerate(sums)],
        "labelled": [{"prompt": p, "completion": c, "label": i % 3 > 0} for i, (p, c) in enumerate(sums)],
        "prompts": [{"prompt": f"{x} " * (1 + i % 3)} for i, x in enumerate("abcdefgh")],
        "talks": [{"prompt": [{"role": "user", "content": f"{x} " * (1 + i % 3)}]} for i, x in enumerate("abcdefgh")],
        "steps": [
            {"prompt": p, "completions": ["so", c, c][: 1 + i % 3], "labels": [True, i % 2 > 0, False][: 1 + i % 3]}
            for i, (p, c) in enumerate(sums)
        ],
    }
    (folder / "zero3.json").write_text(json.dumps(ZERO3))
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))


def run(folder: Path, name: str, out: Path, processes: int, *, exact: bool = False, **changes: Any) -> Any:
    """What training gives of a case in a world of so many processes, of 12 rows a step in all; `exact`: in float64."""
    case = CASES[name]
    fields = {
        "model": folder / case.model,
        "dataset": folder / f"{case.data}.jsonl",
        "output_dir": out,
        "learning_rate": 3e-3,
        "adam_epsilon": 1e-3,  # a step is then a smooth function of the gradient
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 4 // processes,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_steps": 0,
    }
    fields |= case.changes | changes
    if "eval_dataset" in fields:
        fields["eval_dataset"] = folder / f"{fields['eval_dataset']}.jsonl"
    fields |= {name: folder / fields[name] for name in ("teacher_model", "teacher_cache") if name in fields}
    fields |= {"reward": f"{folder}/{fields['reward']}"} if "reward" in fields else {}
    beside = {name: fields[name] for name in ("reward_model", "value_model") if name in fields}
    fields |= {name: folder / (f"{of}, exact" if exact and of == "judge" else of) for name, of in beside.items()}
    given = dict(case.given)
    if exact:
        kind = AutoModelForSequenceClassification if case.model == "judge" else AutoModelForCausalLM
        model = kind.from_pretrained(folder / case.model, dtype=torch.float64)
        given |= {"model": model, "processing_class": (talking if case.model == "talker" else tiny).tokenizer()}
        fields["model"] = ""
        if "teacher_model" in fields and "teacher_cache" not in fields:
            given["teacher_model"] = kind.from_pretrained(fields["teacher_model"], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        if "tools" in fields:
            fields["tools"] = f"{folder}/{fields['tools']}"
            patch.setattr(Generate, "__call__", rolls_first(Generate.__call__))
        return case.verb(case.config(**fields), **given)


def runs_of_rank(rank: int, folder: Path, engine: str, jobs: list[tuple[str, Path, dict[str, Any]]]) -> list[float]:
    """What one of two processes does: these jobs under this engine. The share of the weights that it has after each."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} | ENGINES[engine]
    if BY_FILE in os.environ:
        os.environ[BY_FILE] = str(folder / os.environ[BY_FILE])
    found = []
    for name, out, changes in jobs:
        torch.manual_seed(0)
        found.append(share_held(run(folder, name, out, 2, **changes)))
    return found


def share_held(model: torch.nn.Module) -> float:
    """Of all elements of the weights, those in the memory of this process."""
    held, whole = 0, 0
    for p in model.parameters():
        cut = getattr(p, "ds_tensor", None)  # DeepSpeed's part, beside which there is what it has gathered
        parts = [p.to_local()] if isinstance(p, DTensor) else [p] if cut is None else [p, cut]
        held += sum(x.numel() for x in parts)
        whole += full_numel(p)
    return held / whole
