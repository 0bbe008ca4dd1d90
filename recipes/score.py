"""Held-out sums that models get right: `python recipes/score.py runs/sft-dpo/*`. One that judges is left out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers.utils import logging

from fastpost.demo import accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy accuracy of models on held-out problems.")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--dataset", type=Path, default=Path("runs/sums/held_out.jsonl"))
    options = parser.parse_args()
    logging.disable_progress_bar()
    for model in filter(speaks, options.models):
        print(f"{model}: {accuracy(model, options.dataset):.1%} right")


def speaks(model: Path) -> bool:
    """Whether it is a whole model that writes text."""
    config = model / "config.json"
    return config.exists() and json.loads(config.read_text())["architectures"][0].endswith("ForCausalLM")


if __name__ == "__main__":
    main()
