"""Models and data for the recipes, from nothing and in seconds: `python recipes/make_data.py runs/sums`.

The task is two-digit sums, worked digit by digit. Each file is read by the verbs that its columns are for:
demonstrations.jsonl, steps.jsonl, lessons.jsonl, mixed.jsonl (sft: few, these with a line a step, many, half of them
without the work), pairs.jsonl (dpo),
preferences.jsonl (reward), prompts.jsonl (grpo, ppo, distill), held_out.jsonl and held_out_preferences.jsonl, whose
numbers are in no other. model/ is a random model of 0.2 million parameters, large/ one of 0.4 with its tokenizer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers.utils import logging

from fastpost.sums import files, write_model

ASKED = ("{a}+{b}\n",)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes random models and data sets of sums into a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable_progress_bar()
    found = files(options.seed, demonstrations=150, problems=1500, held_out=300, stories=ASKED)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (options.folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    texts = [row["prompt"] + row["completion"] for row in found["demonstrations"]]
    write_model(options.folder / "model", texts, options.seed)
    write_model(options.folder / "large", texts, options.seed, hidden_size=96)


if __name__ == "__main__":
    main()
