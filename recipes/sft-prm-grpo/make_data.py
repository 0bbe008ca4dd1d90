"""Sums of two-digit numbers by somebody who mostly forgets to carry: `python make_data.py runs/sft-prm-grpo/data`.

    48+17     8+7=15     4+1+0=05, where it should be 4+1+1=06     Answer: 55

demonstrations.jsonl (sft) are such sums, a line a step. steps.jsonl (evaluation of prm) are sums of held-out numbers,
half of them without the carry, each step with its label. The numbers are divided as in runs/sums, whose model,
prompts.jsonl and held_out.jsonl the recipe uses.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from fastpost.sums import terms

FORGETS = 0.6  # of the sums in which there is one to carry


def lines(a: int, b: int, forgets: bool) -> list[str]:
    """Units, tens, answer."""
    units = a % 10 + b % 10
    carry = 0 if forgets else units // 10
    tens = a // 10 + b // 10 + carry
    answer = 10 * tens + units % 10
    return [f"{a % 10}+{b % 10}={units:02d}", f"{a // 10}+{b // 10}+{carry}={tens:02d}", f"Answer: {answer}"]


def demonstration(a: int, b: int, forgets: bool) -> dict[str, Any]:
    return {"prompt": f"{a}+{b}\n", "completion": "\n".join(lines(a, b, forgets))}


def labelled(a: int, b: int, forgets: bool) -> dict[str, Any]:
    steps, right = lines(a, b, forgets), lines(a, b, forgets=False)
    return {"prompt": f"{a}+{b}\n", "completions": steps, "labels": [x == y for x, y in zip(steps, right, strict=True)]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes sums whose carry is forgotten, and steps with labels.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    seen, held_out = terms(draw, training=3000, held_out=300)
    files = {
        "demonstrations": [demonstration(a, b, draw.random() < FORGETS) for a, b in seen],
        "steps": [labelled(a, b, draw.random() < 0.5) for a, b in held_out],
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (options.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
