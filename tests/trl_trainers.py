"""TRL's trainers on tiny models: how the tests build them, train them, and read what they did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from fastpost.integrations import trl_heads

V = tiny.SHAPE["vocab_size"]
CLOCKS = ("runtime", "per_second", "step_time")


@dataclass(frozen=True)
class Run:
    losses: Tensor  # of every forward and backward, in order
    logs: Tensor  # every number that TRL logged but times, end to end
    weights: Tensor  # all of them, end to end


@dataclass(frozen=True)
class Kind:
    """How a trainer of TRL's is built on a tiny model."""

    trainer: str
    rows: str
    replay: str = ""  # how it wants its completions
    teacher: bool = False

    def classes(self) -> tuple[Any, Any]:
        source = trl
        if self.trainer in ("CPO", "ORPO"):
            source = __import__(f"trl.experimental.{self.trainer.lower()}", fromlist=["_"])
        return getattr(source, f"{self.trainer}Trainer"), getattr(source, f"{self.trainer}Config")


KINDS = {
    "sft": Kind("SFT", "sft"),
    "dpo": Kind("DPO", "dpo"),
    "kto": Kind("KTO", "kto"),
    "grpo": Kind("GRPO", "prompts", replay="pair"),
    "rloo": Kind("RLOO", "prompts", replay="ids"),
    "distillation": Kind("Distillation", "prompts", replay="ids", teacher=True),
    "cpo": Kind("CPO", "dpo"),
    "orpo": Kind("ORPO", "dpo"),
}
SETTINGS: dict[str, Any] = {
    "max_steps": 20,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-6,  # or a gradient that is all rounding makes a step of its own
    "logging_steps": 1,
    "seed": 3,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
SAMPLING = {"num_generations": 4, "max_completion_length": 8}


def data(rows: str) -> Dataset:
    sums = [(f"{a}+{b}=", str(a + b), str(a * b + 7)) for a in range(6) for b in range(4)]
    columns: Callable[..., dict[str, Any]] = {
        "sft": lambda p, y, n: {"prompt": p, "completion": y},
        "dpo": lambda p, y, n: {"prompt": p, "chosen": y, "rejected": n},
        "kto": lambda p, y, n: {"prompt": p, "completion": y, "label": len(y) == 1},
        "prompts": lambda p, y, n: {"prompt": p},
    }[rows]
    return Dataset.from_list([columns(*row) for row in sums])


def replayed(pair: bool) -> Callable[..., Any]:
    """Completions that depend on the number of the call alone, in place of what the model would say."""
    calls = iter(range(1000))

    def generate(self: Any, prompt_ids: list[list[int]], *_: object, **__: object) -> Any:
        draw = torch.Generator().manual_seed(next(calls))
        lengths = torch.randint(1, 8, (len(prompt_ids),), generator=draw).tolist()
        ids = [[*torch.randint(5, V, (n,), generator=draw).tolist(), 1] for n in lengths]
        return (ids, None) if pair else ids

    return generate


def reward(completions: list[str], **_: object) -> list[float]:
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def trainer_of(
    name: str,
    out: Path,
    saved: Path | Callable[[], Any],
    lora: LoraConfig | None = None,
    evaluates: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    kind = KINDS[name]
    made, configured = kind.classes()
    torch.manual_seed(0)  # for LoRA's A
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype) if isinstance(saved, Path) else saved()
    more: dict[str, Any] = {"train_dataset": data(kind.rows)}
    if evaluates:
        more["eval_dataset"] = data(kind.rows).select(range(6))
        config = {"eval_strategy": "steps", "eval_steps": 2} | config
    if name in ("grpo", "rloo"):
        more["reward_funcs"] = reward
    if kind.replay:
        config = {k: v for k, v in SAMPLING.items() if name != "distillation" or k != "num_generations"} | config
    if kind.teacher:
        more["teacher_model"] = tiny.model(seed=1, hidden_size=48).to(dtype)
    if lora is not None:
        more["peft_config"], config = lora, {"learning_rate": 1e-2, "max_steps": 8} | config
    args = configured(**SETTINGS | {"output_dir": str(out)} | config)
    trainer = made(model=model, args=args, processing_class=tiny.tokenizer(), **more)
    if kind.replay:
        trainer._generate_single_turn = MethodType(replayed(kind.replay == "pair"), trainer)
    return trainer


def train(trainer: Any) -> Run:
    losses: list[Tensor] = []
    inner = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        losses.append((found[0] if isinstance(found, tuple) else found).detach().double())
        return found

    trainer.compute_loss = compute_loss
    trainer.train()
    logs = [v for entry in trainer.state.log_history for k, v in sorted(entry.items()) if counts(trainer, k)]
    weights = torch.cat([w.detach().double().flatten() for w in trainer.model.parameters()])
    return Run(torch.stack(losses), torch.tensor(logs, dtype=torch.float64), weights)


def counts(trainer: Any, name: str) -> bool:
    """Not clocks; not the sign of what may be a tie, logged as rewards/margins; not means over padding, too."""
    other = "logits/" in name and type(trainer).__name__ in ("CPOTrainer", "ORPOTrainer")
    return not other and not any(part in name for part in (*CLOCKS, "rewards/accuracies"))


def calls_of_the_head(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of fastpost's functions, as they are called."""
    called: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: called.append(name) or function(*args, **kwargs)

    for name in ("token_stats", "fused_loss"):
        monkeypatch.setattr(trl_heads, name, counted(name, getattr(trl_heads, name)))
    return called


ATTENTION = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
ON_HEAD = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.3}


def experts() -> Any:
    model = tiny.model("mixtral", **EXPERTS)
    model.set_experts_implementation("eager")  # the default takes no float64
    return model


def soft_capped() -> Any:
    return tiny.model("gemma2", head_dim=8, final_logit_softcapping=5.0)


def inputs(width: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(5, V, (3, width))
    labels = ids.clone()
    labels[0, :4], labels[1, -3:] = -100, -100
    return {"input_ids": ids, "labels": labels}


def forwards(trainer: Any) -> str:
    """The module whose forward the trainer's model has."""
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    return model.forward.__func__.__globals__["__name__"]
