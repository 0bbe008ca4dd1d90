"""What the tests of distillation share: a student, a teacher, sequences, and files of all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import tiny
from fastpost.models.role import Role
from fastpost.models.switch import Switch
from fastpost.packing import Example
from fastpost.trainers.config import Distill
from fastpost.trainers.lessons import Lesson

SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(5) for b in range(4)]
ROWS = {
    "sums": [{"prompt": p, "completion": c} for p, c in SUMS],
    "prompts": [{"prompt": p} for p, _ in SUMS],
    "held_out": [{"prompt": f"{a}*{b}="} for a in range(4) for b in range(4)],
    "texts": [{"text": p + c} for p, c in SUMS],
    "chats": [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]} for p, c in SUMS
    ],
}  # fmt: skip


def teacher_model(**changes: Any) -> Any:
    """Wider than its student."""
    return tiny.model("qwen3", seed=1, hidden_size=48, **changes)


def role_of(model: Any) -> Role:
    return Role("teacher", Switch.of(model.requires_grad_(False)), None, trained=False)


def window() -> list[Lesson]:
    """Four sequences of unequal lengths."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for n, prompt in ((9, 3), (4, 1), (12, 5), (7, 6)):
        ids = torch.randint(5, 97, (n,), generator=draw).tolist()
        found.append(Lesson(Example(ids, [i >= prompt for i in range(n)])))
    return found


def write_files(directory: Path) -> Path:
    """Models with their tokenizer, and rows."""
    for name, model in (("model", tiny.model("qwen3")), ("teacher", teacher_model())):
        model.save_pretrained(directory / name)
        tiny.tokenizer().save_pretrained(directory / name)
    for name, rows in ROWS.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def config_of(files: Path | str = "f", out: Path | str = "o", rows: str = "sums", **changes: Any) -> Distill:
    """Six steps on the data's answers, a checkpoint after the third."""
    files = Path(files)
    fields = {
        "model": files / "model",
        "dataset": files / f"{rows}.jsonl",
        "teacher_model": files / "teacher",
        "output_dir": out,
        "learning_rate": 3e-3,
        "lmbda": 0.0,
        "max_completion_length": 5,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 3,
        "gradient_checkpointing": False,
    }
    return Distill(**(fields | changes))
