"""Held-out functions that pass all their tests: `python recipes/code/score.py runs/code/*`."""

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
from fastpost.trainers.rollouts import greedy_reward
from fastpost.trainers.task import Task


def passing(directory: Path, dataset: Path) -> float:
    """Share of the likeliest answers that do."""
    model, tokenizer = load_model(directory, dtype="float32")
    asked = prompts(read_rows(dataset), tokenizer, None)
    how = Sampling(max_completion_length=32)
    return greedy_reward(
        Task(Generate(model, tokenizer, 256), tokenizer, [load_reward("code_tests")], None, how), asked
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Share of functions that pass their tests.")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--dataset", type=Path, default=Path("runs/code/data/held_out.jsonl"))
    options = parser.parse_args()
    logging.disable_progress_bar()
    for model in options.models:
        if (model / "config.json").exists():
            print(f"{model}: {passing(model, options.dataset):.1%} right")


if __name__ == "__main__":
    main()
