"""Held-out products that models get right with a calculator: `python recipes/tools/score.py runs/tools/*`."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.utils import logging

from fastpost.data import prompt_examples
from fastpost.files import read_rows
from fastpost.models.loading import load_model
from fastpost.rewards import load_reward
from fastpost.rollout import Sampling
from fastpost.rollout.sampler import Generate
from fastpost.trainers.rollouts import greedy_reward
from fastpost.trainers.task import Task
from fastpost.turns import load_tool, load_turns
from fastpost.turns.bench import Limits

TOOL = f"{Path(__file__).parent / 'tools.py'}:calculator"


def accuracy(directory: Path, dataset: Path) -> float:
    """Share of right answers, each turn the likeliest."""
    model, tokenizer = load_model(directory, dtype="float32")
    tool, sampling = load_tool(TOOL), Sampling(max_completion_length=64)
    turns = load_turns([tool], model, tokenizer, Limits(), sampling, lambda line: None)
    prompts, _ = prompt_examples(read_rows(dataset), tokenizer, None, tools=[tool.schema])
    sampler = Generate(model, tokenizer, 256)
    return greedy_reward(Task(sampler, tokenizer, [load_reward("number_match")], None, sampling, turns=turns), prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy accuracy of models that may call a calculator.")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--dataset", type=Path, default=Path("runs/tools/data/held_out.jsonl"))
    options = parser.parse_args()
    logging.disable_progress_bar()
    for model in options.models:
        if (model / "config.json").exists():
            print(f"{model}: {accuracy(model, options.dataset):.1%} right")


if __name__ == "__main__":
    main()
