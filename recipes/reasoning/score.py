"""Held-out sums that models get right, and whether they think first: `score.py runs/reasoning/*`."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.utils import logging

from fastpost.data import prompts
from fastpost.files import read_rows
from fastpost.models.loading import load_model
from fastpost.rewards import load_reward
from fastpost.rollout import Sampling
from fastpost.rollout.sampler import Generate
from fastpost.trainers.rollouts import greedy
from fastpost.trainers.task import Task

LONGEST = 32  # tokens; a demonstration has at most 25


def scored(directory: Path, dataset: Path) -> str:
    model, tokenizer = load_model(directory, dtype="float32")
    rewards = [load_reward(name) for name in ("number_match", "think_format")]
    task = Task(Generate(model, tokenizer, 256), tokenizer, rewards, None, Sampling(max_completion_length=LONGEST))
    found = greedy(task, prompts(read_rows(dataset), tokenizer, None)).scores.by_function.values()
    right, thought = (float(values.mean()) for values in found)
    return f"{directory}: {right:.1%} right, {thought:.1%} after a chain of thought"


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy accuracy and format of models on held-out sums.")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--dataset", type=Path, default=Path("runs/reasoning/data/held_out.jsonl"))
    options = parser.parse_args()
    logging.disable_progress_bar()
    for model in options.models:
        if (model / "config.json").exists():
            print(scored(model, options.dataset))


if __name__ == "__main__":
    main()
