"""What the tests of preference verbs share: pairs, the log-probabilities of their tokens by Hugging Face, and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import tiny
from fastpost.data import Pair
from fastpost.packing import Example
from fastpost.trainers.log import read_lines
from timeless import timeless

ROWS = [{"per_device_train_batch_size": 3}, {"per_device_train_batch_size": 2}, {"max_tokens_per_batch": 30}]
SUMS = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a * b + 7)} for a in range(6) for b in range(3)]


def window() -> list[Pair]:
    """Three pairs of unequal lengths, prompt and answers."""
    draw = torch.Generator().manual_seed(1)
    ids = lambda n: torch.randint(5, 97, (n,), generator=draw).tolist()  # noqa: E731
    found = []
    for prompt, chosen, rejected in ((3, 6, 2), (1, 1, 4), (5, 7, 7)):
        begun = ids(prompt)
        mask = [False] * prompt
        better, worse = (Example(begun + ids(n), mask + [True] * n) for n in (chosen, rejected))
        found.append(Pair(better, worse))
    return found


def logps(model: nn.Module, example: Example) -> Tensor:  # (predicted,)
    """Of the predicted tokens, by Hugging Face's own logits of this sequence alone."""
    logp = model(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
    return torch.stack([logp[i - 1, example.input_ids[i]] for i in example.predicted])


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def write_files(directory: Path, rows: Sequence[dict] = SUMS) -> Path:
    """A model directory and rows."""
    tiny.model("qwen3").save_pretrained(directory / "model")
    tiny.tokenizer().save_pretrained(directory / "model")
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def fields(files: Path, out: Path, **changes) -> dict:
    """Of a config: six steps, a checkpoint after the third."""
    return {
        "model": files / "model",
        "dataset": files / "rows.jsonl",
        "output_dir": out,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 3,
        "gradient_checkpointing": False,
    } | changes


def lines(out: Path) -> list[dict]:
    """Of the metrics, without what depends on the clock."""
    return [timeless(line) for line in read_lines(out / "metrics.jsonl")]


def weights(out: Path) -> bytes:
    (file,) = [path for path in out.glob("*.safetensors") if path.name in ("model.safetensors", ADAPTER)]
    return file.read_bytes()


ADAPTER = "adapter_model.safetensors"
