"""The README's table of losses, from their docstrings: `make readme` writes it, a test compares it.

The first paragraph of a docstring is the equation, and arXiv numbers anywhere in the docstring are its papers.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from fastpost import losses
from fastpost.equation import Loss, ScalarLoss

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"<!-- table:losses -->\n(.*?)<!-- /table -->", re.DOTALL)
FAMILIES = ("sft", "preference", "reference_free", "unpaired", "policy", "distill", "value", "reward")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")


def catalogue() -> Iterator[Loss | ScalarLoss]:
    """Every public loss, family by family, in the order of its page."""
    for family in FAMILIES:
        for name, each in vars(importlib.import_module(f"fastpost.losses.{family}")).items():
            if isinstance(each, Loss | ScalarLoss) and getattr(losses, name, None) is each:
                yield each


def row(loss: Loss | ScalarLoss) -> str:
    equation, *more = re.split(r"\n\s*\n", loss.__doc__ or "", maxsplit=1)
    papers = dict.fromkeys(ARXIV.findall(equation) or ARXIV.findall(" ".join(more)))
    links = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in papers)
    shown = " ".join(re.split(r"\.\s+arXiv:", equation)[0].split()).rstrip(".").replace("|", r"\|")
    return f"| `{loss.name}` | {shown} | {loss.unit} | {links} |"


def table() -> str:
    return "\n".join(["| name | a unit's loss | unit | paper |", "|---|---|---|---|", *map(row, catalogue())]) + "\n"


if __name__ == "__main__":
    text = f"<!-- table:losses -->\n{table()}<!-- /table -->"
    README.write_text(BLOCK.sub(lambda _: text, README.read_text()))
