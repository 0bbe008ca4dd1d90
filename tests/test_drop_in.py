"""docs/drop-in.md runs: in each pair of blocks, what was there before and what replaces it give the same numbers.

The page says with comments that are not shown what a reader has and what must agree:

    <!-- setup: ...python... -->, a block "before", a block "after", <!-- same: expressions -->

Setup and before run in one namespace, setup and after in another, both from one seed. A setup may follow several pairs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "drop-in.md").read_text()
PIECES = re.compile(
    r"^## (?P<title>[^\n]*)$"
    r"|^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|^```python\n(?P<code>.*?)^```$"
    r"|^<!-- same: (?P<same>[^\n]*) -->$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Pair:
    title: str
    setup: str
    before: str
    after: str
    same: str


def pairs(page: str) -> list[Pair]:
    """In the order of the page. Two blocks of code come before each `same`, and none is left over."""
    found, title, setup, code = [], "", "", []
    for piece in PIECES.finditer(page):
        kind, text = str(piece.lastgroup), piece[str(piece.lastgroup)]
        if kind == "title":
            title = text
        elif kind == "setup":
            setup = text
        elif kind == "code":
            code.append(text)
        else:
            assert len(code) == 2, f"{title}: {len(code)} blocks of code before 'same: {text}'"
            found.append(Pair(title, setup, *code, text))
            code = []
    assert not code, f"{title}: a block of code is compared with nothing"
    return found


def run(*sources: str, same: str) -> list[Any]:
    """What the expressions of `same` are worth afterwards."""
    names: dict[str, Any] = {"torch": torch}
    torch.manual_seed(0)
    for source in sources:
        exec(source, names)
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in eval(f"[{same}]", names)]


PAIRS = pairs(PAGE)


@pytest.mark.parametrize("pair", PAIRS, ids=[f"{i}: {pair.title}" for i, pair in enumerate(PAIRS)])
def test_before_and_after_agree(pair):
    before, after = run(pair.setup, pair.before, same=pair.same), run(pair.setup, pair.after, same=pair.same)
    assert before
    torch.testing.assert_close(after, before)
    assert "fastpost" in pair.after and "fastpost" not in pair.before


def test_every_section_is_run():
    titles = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert set(titles) == {pair.title for pair in PAIRS}
    assert len(PAIRS) >= len(titles) == 5


def test_a_page_whose_blocks_disagree_fails():
    page = "## T\n<!-- setup\nx = torch.ones(2)\n-->\n```python\ny = x\n```\n```python\ny = 2 * x  # fastpost\n```\n"
    (pair,) = pairs(page + "<!-- same: y -->\n")
    with pytest.raises(AssertionError, match="not close"):
        test_before_and_after_agree(pair)
    with pytest.raises(AssertionError, match="T: a block of code is compared with nothing"):
        pairs(page)
