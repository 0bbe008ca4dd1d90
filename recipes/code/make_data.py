"""Functions of one line, which are right if they pass their tests.

demonstrations.jsonl (sft) write them, half of the time without the brackets that some of them need; prompts.jsonl
(grpo) and held_out.jsonl have tests alone, and no task is in two of them. model/ is a random model of 0.2 million
parameters.
    add 3, times 2
    def f(x): return (x + 3) * 2
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

from transformers.utils import logging

from fastpost.sums import write_model

SIGNS = {"add": "+", "minus": "-", "times": "*"}
TRIED = (0, 5, -3)
Operation = tuple[str, int]


def asked(first: Operation, second: Operation) -> dict[str, Any]:
    """The task, and what a function that does it says of some numbers."""
    right = compiled(written(first, second))
    tests = [f"assert f({x}) == {right(x)}" for x in TRIED]
    return {"prompt": f"{first[0]} {first[1]}, {second[0]} {second[1]}\n", "tests": tests}


def written(first: Operation, second: Operation, brackets: bool = True) -> str:
    inner = f"x {SIGNS[first[0]]} {first[1]}"
    return f"def f(x): return {f'({inner})' if brackets else inner} {SIGNS[second[0]]} {second[1]}"


def compiled(code: str) -> Any:
    """The function of a text that is ours."""
    found: dict[str, Any] = {}
    exec(code, found)
    return found["f"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a random model and tasks with their tests into a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable_progress_bar()
    draw = random.Random(options.seed)
    operations = list(product(SIGNS, range(1, 10)))
    tasks = draw.sample(list(product(operations, operations)), 700)
    shown = [
        {"prompt": asked(*task)["prompt"], "completion": written(*task, brackets=i % 2 == 0)}
        for i, task in enumerate(tasks[:300])
    ]
    files = {
        "demonstrations": shown,
        "prompts": [asked(*task) for task in tasks[300:600]],
        "held_out": [asked(*task) for task in tasks[600:]],
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (options.folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    write_model(options.folder / "model", [row["prompt"] + row["completion"] for row in shown], options.seed)


if __name__ == "__main__":
    main()
