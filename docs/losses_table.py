"""The tables of losses, from their docstrings: `make readme` writes them, a test compares them.

docs/losses.md has the equations: the first paragraph of a docstring, and its papers, the arXiv numbers anywhere in it.
The README has the names.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from fastpost import losses
from fastpost.equation import Loss, ScalarLoss

PAGE = Path(__file__).resolve().parent / "losses.md"
README = PAGE.parent.parent / "README.md"
# A page of fastpost/losses -> what its losses learn from
FAMILIES = {
    "sft": "demonstrations",
    "preference": "pairs, against a reference",
    "reference_free": "pairs alone",
    "unpaired": "answers, good or bad",
    "policy": "rewards",
    "distill": "a teacher",
    "value": "returns: a critic",
    "reward": "preferences, steps: a reward model",
}
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")


def of_family(family: str) -> Iterator[Loss | ScalarLoss]:
    """Its public losses, in the order of its page."""
    for name, each in vars(importlib.import_module(f"fastpost.losses.{family}")).items():
        if isinstance(each, Loss | ScalarLoss) and getattr(losses, name, None) is each:
            yield each


def row(loss: Loss | ScalarLoss) -> str:
    equation, *more = re.split(r"\n\s*\n", loss.__doc__ or "", maxsplit=1)
    papers = dict.fromkeys(ARXIV.findall(equation) or ARXIV.findall(" ".join(more)))
    links = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in papers)
    shown = " ".join(re.split(r"\.\s+arXiv:", equation)[0].split()).rstrip(".").replace("|", r"\|")
    return f"| `{loss.name}` | {shown} | {loss.unit} | {links} |"


def equations() -> str:
    rows = [row(loss) for family in FAMILIES for loss in of_family(family)]
    return "\n".join(["| name | a unit's loss | unit | paper |", "|---|---|---|---|", *rows]) + "\n"


def names() -> str:
    lines = ["| it learns from | a unit is | losses |", "|---|---|---|"]
    for family, title in FAMILIES.items():
        found = list(of_family(family))
        for unit in dict.fromkeys(loss.unit for loss in found):
            named = " ".join(f"`{loss.name}`" for loss in found if loss.unit == unit)
            lines.append(f"| [{title}](fastpost/losses/{family}.py) | a {unit} | {named} |")
    return "\n".join(lines) + "\n"


# (page, mark, what is written there)
TABLES = ((PAGE, "equations", equations), (README, "losses", names))


def written(page: str, mark: str, table: str) -> str:
    """The page with this table at its mark."""
    block = re.compile(f"<!-- table:{mark} -->\n.*?<!-- /table -->", re.DOTALL)
    return block.sub(lambda _: f"<!-- table:{mark} -->\n{table}<!-- /table -->", page)


if __name__ == "__main__":
    for page, mark, table in TABLES:
        page.write_text(written(page.read_text(), mark, table()))
