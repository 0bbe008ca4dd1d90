"""Data and models for the recipe, from nothing: `python recipes/reasoning/make_data.py runs/reasoning/data`.

Two-digit sums. A chain of thought goes digit by digit with the carry, between tags, and the answer is behind it:
    48+12
    <think>8+2=10, 4+1+1=06</think>Answer: 60
demonstrations.jsonl (sft) are few; prompts.jsonl (grpo, rejection, best-of-n) and held_out.jsonl have answers alone,
and no number of the last is in another. large/ is a random model of 0.4 million parameters, small/ one of 0.2.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tokenizers import AddedToken
from transformers.utils import logging

from fastpost.sums import make_tokenizer, terms, worked, write_random

DEMONSTRATIONS, PROMPTS, HELD_OUT = 150, 1500, 600
TAGS = [AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")]
Row = dict[str, str]


def asked(a: int, b: int) -> Row:
    return {"prompt": f"{a}+{b}\n", "answer": str(a + b)}


def demonstrated(a: int, b: int) -> Row:
    chain, _, answer = worked(a, b).partition(". ")
    return asked(a, b) | {"completion": f"<think>{chain}</think>{answer}"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes random models and data sets of sums into a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable_progress_bar()
    seen, unseen = terms(random.Random(options.seed), DEMONSTRATIONS + PROMPTS, HELD_OUT)
    files = {
        "demonstrations": [demonstrated(a, b) for a, b in seen[:DEMONSTRATIONS]],
        "prompts": [asked(a, b) for a, b in seen[DEMONSTRATIONS:]],
        "held_out": [asked(a, b) for a, b in unseen],
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (options.folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = make_tokenizer(row["prompt"] + row["completion"] for row in files["demonstrations"])
    tokenizer.add_tokens(TAGS)
    write_random(options.folder / "large", tokenizer, options.seed, hidden_size=96)
    write_random(options.folder / "small", tokenizer, options.seed)


if __name__ == "__main__":
    main()
