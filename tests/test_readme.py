"""What the README says is so: its example runs, its files and commands are there, its losses have those units."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastpost as fp
from catalogue import CASES
from fastpost.equation import ScalarLoss
from rules import assert_close_to_truth

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


# What the module that the diff of CONTRIBUTING adds to has imported.
PREAMBLE = """
import torch.nn.functional as F
from torch import Tensor
from fastpost.equation import loss
from fastpost.knobs import Positive
from fastpost.types import Batch, Stats
"""


def blocks(language: str, text: str = README) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for marked, block in fenced if marked == language]


def test_the_example_runs(monkeypatch):
    hidden = torch.randn(12, 16, requires_grad=True)
    weight = torch.randn(50, 16)
    target = torch.randint(50, (12,))
    target[[5, 11]] = -100
    names = {
        "hidden": hidden,
        "target": target,
        "lengths": torch.tensor([6, 6]),
        "advantage": torch.tensor([1.0, -1.0]),
        "model": SimpleNamespace(lm_head=SimpleNamespace(weight=weight)),
    }
    monkeypatch.setattr(fp.Head, "of", staticmethod(lambda model: fp.Head(model.lm_head.weight)))
    (example,) = blocks("python")
    exec(example, names)
    by_torch = [
        (hidden.to(dtype) @ weight.to(dtype).T).log_softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0]
        for dtype in (torch.float32, torch.float64)
    ]
    assert_close_to_truth(names["logp"], *(torch.where(target == -100, 0.0, logp) for logp in by_torch))
    assert hidden.grad is not None and hidden.grad.norm() > 0
    assert names["stats"].entropy[0] > 0


def test_every_file_of_the_map_exists_and_every_module_is_on_it():
    (lines,) = (block.splitlines() for block in blocks("") if block.startswith("fastpost/\n"))
    named = [line.split()[0] for line in lines]
    paths = [f"fastpost/{name}" if line.startswith("  ") else name for name, line in zip(named, lines, strict=True)]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "fastpost").iterdir() if path.name[0] not in "_."}
    assert {name for name in there if name.endswith((".py", "/"))} == set(named[1 : named.index("kernels/triton/")])


def test_every_verb_has_its_method():
    pytest.importorskip("transformers")
    from fastpost.cli import VERBS

    (rows,) = re.findall(r"^\| method \| verb \|\n(.*?)\n\n", README, re.DOTALL | re.MULTILINE)
    named = {name for cell in re.findall(r"`([^`]+)`", rows) for name in cell.split()}
    assert {verb.split()[0] for verb in VERBS} - {"demo"} == named - {"--reward"}


def test_every_make_target_named_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", README + CONTRIBUTING, re.MULTILINE))
    assert {"demo", "test", "lint"} <= named <= targets


def test_the_tables_of_losses_are_what_their_docstrings_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from losses_table import TABLES, equations, names, written

    for page, mark, table in TABLES:
        now = page.read_text()
        assert f"<!-- table:{mark} -->" in now and now == written(now, mark, table()), "run `make readme`"
    declared = {n for n in fp.losses.__all__ if isinstance(getattr(fp.losses, n), fp.Loss | ScalarLoss)}
    assert set(re.findall(r"^\| `(\w+)` \|", equations(), re.MULTILINE)) == declared
    assert set(re.findall(r"`(\w+)`", names())) == declared


def test_every_link_between_pages_leads_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("recipes/*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)", page.read_text())]
    local = [(page, link) for page, link in links if "://" not in link]
    assert len(local) > 20
    assert [(page.name, link) for page, link in local if not (page.parent / link).exists()] == []


def test_every_loss_of_the_catalogue_has_a_test_row():
    assert {loss.name for loss, _ in CASES.values()} == {
        name for name in fp.losses.__all__ if isinstance(getattr(fp.losses, name), fp.Loss)
    }


def test_the_loss_of_contributing_is_right_as_it_stands():
    (diff,) = (block for block in blocks("diff", CONTRIBUTING) if "@loss" in block)
    source = "\n".join(line[1:] for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++"))
    names: dict = {}
    exec(compile(PREAMBLE + source, "CONTRIBUTING.md", "exec"), names)
    logp, ref = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-1.5, -2.0, -2.0, -4.5])
    batch = fp.Batch(torch.zeros(4, dtype=torch.int64), torch.tensor([2, 2]), ref_logp=ref, margin=torch.tensor([0.5]))
    want = -torch.nn.functional.logsigmoid(torch.tensor([0.25 * (0.5 - -0.5) - 0.5]))
    assert torch.allclose(names["odpo"](fp.Stats(logp=logp), batch, beta=0.25), want)
