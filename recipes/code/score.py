"""Held-out functions that pass all their tests: `python recipes/code/score.py runs/code/*`."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.utils import logging

from fastpost.demo import accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description="Share of functions that pass their tests, the likeliest answers.")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--dataset", type=Path, default=Path("runs/code/data/held_out.jsonl"))
    options = parser.parse_args()
    logging.disable_progress_bar()
    for model in options.models:
        if (model / "config.json").exists():
            print(f"{model}: {accuracy(model, options.dataset, 'code_tests', 32):.1%} right")


if __name__ == "__main__":
    main()
