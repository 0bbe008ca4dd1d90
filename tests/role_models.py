"""What the tests of roles share: a base, adapters that have learnt something, a reward model's files, PPO's roles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import tiny
from fastpost.models import attention
from fastpost.models.qlora import keep_differentiable
from fastpost.models.roles import Copied, Roles
from fastpost.packing import Example, pack

ROWS = [[5, 6, 7, 8, 9, 10, 11], [12], [(7 * i) % 97 for i in range(23)], [(11 * i + 3) % 97 for i in range(12)]]
PACKED = pack([Example(row, [i > 2 for i in range(len(row))]) for row in ROWS])
ENDS = PACKED.batch.lengths.cumsum(0) - 1


def base(family: str = "llama", **changes: Any) -> Any:
    """In training mode, so that what drops, drops."""
    attention.register()
    model = tiny.model(family, **changes)
    model.set_attn_implementation(attention.NAME)
    return model.train()


def four_bits(path: Path, prepared: bool = True) -> Any:
    """A directory's causal LM in NF4, which computes in bf16. Rows must be of 64."""
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=four)
    model.set_attn_implementation(attention.NAME)
    if prepared:
        keep_differentiable(model)
    return model.train()


def checkpointed(model: Any) -> Any:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model


def lora(r: int = 4, dropout: float = 0.0, **changes: Any) -> LoraConfig:
    return LoraConfig(r=r, lora_dropout=dropout, **{"target_modules": "all-linear"} | changes)


@torch.no_grad()
def learnt(model: Any) -> Any:
    """At first all that an adapter adds is zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("score.weight"):
            parameter.normal_(0, 0.2)
    return model


def write_reward(
    path: Path, model: Any = None, labels: int = 1, r: int = 4, dropout: float = 0.0, embeddings: bool = False
) -> Path:
    """What TRL's RewardTrainer leaves: PEFT's adapter of a model for sequence classification, with its head."""
    (base() if model is None else model).save_pretrained(path / "base")
    judge = AutoModelForSequenceClassification.from_pretrained(path / "base", num_labels=labels)
    config = lora(r, dropout, task_type="SEQ_CLS", modules_to_save=["score"])
    learnt(get_peft_model(judge, config)).save_pretrained(path / "reward", save_embedding_layers=embeddings)
    return path / "reward"


def ppo(model: Any, reward: Path, dropout: float = 0.0) -> Roles:
    """After some training: the value is no longer what the reward is."""
    roles = Roles.of(model, policy=lora(dropout=dropout), reward=reward, value=Copied("reward"))
    with torch.no_grad():
        for tensors in roles.trainable().values():
            for tensor in tensors:
                tensor += 0.1 * torch.randn_like(tensor)
    return roles


def same(ours: Any, theirs: Any) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
