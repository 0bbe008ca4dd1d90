"""What `benchmarks/learn.py` learns: the sums of `fastpost.sums`, asked for as `48+12`, in a folder of a seed's own.

base/, large/  random models with one tokenizer, large the one for a teacher
*.jsonl        what `fastpost.sums.files` has
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastpost.demo import accuracy
from fastpost.files import read_rows
from fastpost.sums import files, write_model
from fastpost.trainers.log import append

DEMONSTRATIONS, PROBLEMS, HELD_OUT = 150, 1500, 400
LARGE = 96  # hidden size of the teacher; the others have 64
ASKED = ("{a}+{b}\n",)


def write_task(folder: Path, seed: int) -> None:
    found = files(seed, DEMONSTRATIONS, PROBLEMS, HELD_OUT, ASKED)
    for name, rows in found.items():
        append(folder / f"{name}.jsonl", rows)
    texts = [row["prompt"] + row["completion"] for row in found["demonstrations"]]
    write_model(folder / "base", texts, seed)
    write_model(folder / "large", texts, seed, LARGE)


# ---- scores, of a model's directory ----


def right_answers(model: Path, folder: Path) -> float:
    """Share of the held-out sums that the model, always taking the likeliest token, gets right."""
    return accuracy(model, folder / "held_out.jsonl")


@torch.no_grad()
def right_order(model: Path, folder: Path) -> float:
    """Share of the held-out pairs whose better answer has the higher score, in transformers; ties are half."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)  # of the head, where the model has none yet
    tokenizer = AutoTokenizer.from_pretrained(model)
    judge = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).eval()
    judge.config.pad_token_id = tokenizer.pad_token_id
    pairs = read_rows(folder / "held_out_preferences.jsonl")
    texts = [pair["prompt"] + pair[side] + tokenizer.eos_token for side in ("chosen", "rejected") for pair in pairs]
    read = tokenizer(texts, padding=True, return_tensors="pt")
    chosen, rejected = judge(read.input_ids, read.attention_mask).logits[:, 0].chunk(2)
    return float((chosen > rejected).float().mean() + (chosen == rejected).float().mean() / 2)
