"""Imports point one way: types <- losses, advantages, packing; kernels | core <- head <- models <- trainers <- cli.

Every import statement of the package is read, those inside functions too, and looked up in MAY_IMPORT. A loss never
sees the head and the head never sees a loss; nothing below the trainers sees them; the core needs torch alone.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A part of the package -> the parts it may import, besides itself. The longest name that fits a module is its part.
MAY_IMPORT = {
    "core": (),
    "core.quantised": (),
    "types": ("core.quantised",),
    "knobs": ("types",),
    "equation": ("types", "knobs"),
    "losses": ("types", "knobs", "equation"),
    "advantages": ("types", "losses"),
    "weights": ("types",),
    "metrics": ("types", "losses"),
    "packing": ("types", "_native"),
    "shared_prompt": ("types", "packing"),
    "kernels": (),
    "core.gemm": ("core.native",),
    "core.rows": (),
    "_native": (),
    "core.native": ("_native", "types", "core.rows"),
    "core.topk": ("types", "core.rows"),
    "reference": ("types", "core.quantised"),
    "core.shard": ("types", "core.quantised", "core.rows"),
    "core.problem": ("types", "core.quantised"),
    "core.sweep": ("core.problem", "core.gemm", "core.rows", "core.topk", "kernels", "core.native"),
    "core.fused": ("types", "core.gemm", "core.sweep"),
    "core.kept": ("core.rows", "core.sweep"),
    "core.chunk": (
        *("types", "core.gemm", "core.rows", "core.topk"),
        *("core.sweep", "core.fused", "core.kept", "core.shard"),
    ),
    "core.once": (),
    "core.schedules": (
        *("types", "core.problem", "core.quantised", "core.gemm", "core.once"),
        *("core.sweep", "core.shard", "core.chunk"),
    ),
    "core.eager": (
        *("types", "core.problem", "core.quantised", "equation", "core.gemm", "core.once"),
        *("core.sweep", "core.shard", "core.kept", "core.chunk", "core.schedules"),
    ),
    "core.lowrank": ("types", "core.gemm", "core.once", "core.problem"),
    "core.checks": ("types", "core.quantised"),
    "core.compaction": ("core.checks",),
    "core.door": ("types", "core.quantised", "core.problem", "core.lowrank", "core.checks", "core.compaction"),
    "head": ("types", "equation", "core.gemm", "core.schedules", "core.eager", "core.door"),
    "core.likeliest": ("types", "core.gemm", "core.rows", "core.sweep", "core.door"),
    "functional": ("types", "core.gemm", "losses", "head"),
    "": ("types", "equation", "losses", "advantages", "weights", "metrics", "packing", "head", "functional"),
    "files": ("types",),
    "data": ("types", "packing", "files"),
    "models": ("types", "core.quantised", "packing", "shared_prompt", "head"),
    "rollout": ("types", "packing", "head", "models"),
    "integrations": ("", "types", "core.door", "equation", "losses", "head", "models"),
    "sandbox.inside": (),
    "sandbox": ("sandbox.inside",),
    "rewards": ("types", "packing", "head", "data", "models", "rollout", "sandbox"),
    "turns": ("types", "files", "data", "models", "rollout", "rewards"),
    "watching": (),
    "trainers": (
        *("", "knobs", "types", "losses", "advantages", "weights", "metrics", "packing", "shared_prompt", "head"),
        *("core.likeliest", "files", "data", "models", "integrations", "rollout", "rewards", "turns", "watching"),
        "doctor.checks",
    ),
    "doctor.columns": ("types", "files", "data"),
    "doctor.checks": ("types", "files", "data", "doctor.columns"),
    "doctor": ("types", "files", "data", "packing", "models", "trainers", "doctor.columns", "doctor.checks"),
    "stages.journal": (),
    "stages.rows": (),
    "evaluation.refusal": (),
    "stages": (
        *("types", "files", "data", "models", "rollout", "rewards", "turns", "judging", "trainers"),
        *("stages.journal", "stages.rows", "evaluation.refusal"),
    ),
    "judging": (
        *("", "types", "files", "data", "packing", "shared_prompt", "models", "rollout"),
        *("trainers", "stages.journal", "stages.rows"),
    ),
    "evaluation": (
        *("", "types", "files", "data", "packing", "models", "rollout", "rewards", "trainers", "stages", "judging"),
        *("stages.journal", "stages.rows", "evaluation.refusal"),
    ),
    "sums": (),
    "demo": ("", "types", "files", "data", "models", "rollout", "rewards", "trainers", "sums"),
    "report": ("watching", "trainers"),
    "planning": ("types", "core.quantised", "core.sweep", "core.eager", "models", "rollout", "trainers"),
    "cli": (
        *("", "types", "files", "data", "models", "rewards", "trainers", "report", "planning", "doctor", "judging"),
        *("stages", "evaluation", "demo"),
    ),
}
# Doors that lead up, opened when called and not on import: (module, what it imports).
DOORS = {
    ("fastpost.types.head", "fastpost.models.heads"),
    ("fastpost.rewards.load", "fastpost.judging.load"),
    ("fastpost.trainers.comparing", "fastpost.judging"),
}

# Parts that import more than torch; `import fastpost` reaches none of them.
WITH_EXTRAS = {
    *("files", "data", "models", "integrations", "rollout", "rewards", "turns"),
    *("watching", "trainers", "report", "planning", "doctor", "stages", "judging", "evaluation"),
    *("sums", "demo", "cli"),
    "sandbox.inside",
}
OUTSIDE = {part: {"torch"} for part in MAY_IMPORT.keys() - WITH_EXTRAS} | {
    "kernels": {"torch", "triton"},
    "core.quantised": {"torch", "bitsandbytes"},  # imported where a weight of it is read
}


def modules() -> dict[str, Path]:
    """Import name -> file, for every module of the package."""
    found = {}
    for folder, package in ((ROOT / "fastpost", "fastpost"), (ROOT / "kernels" / "triton", "fastpost.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def part_of(module: str) -> str | None:
    """The part a module belongs to: fastpost.losses.kl -> losses. None: MAY_IMPORT does not know it."""
    name = module.removeprefix("fastpost").removeprefix(".")
    while name and name not in MAY_IMPORT:
        name = name.rpartition(".")[0]
    return name if name or module == "fastpost" else None


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[str, int]]:
    """(imported module, line). Relative names are made full; `from fastpost import head` imports fastpost.head."""
    here = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = here[: len(here) + 1 - node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield base if part_of(full) in (None, part_of(base)) else full, node.lineno


def complaints(source: str, module: str, is_package: bool = False) -> list[str]:
    part, found = part_of(module), []
    if part is None:
        return [f"{module} is in no layer: give it a line in MAY_IMPORT"]
    for name, line in imports(source, module, is_package):
        top = name.partition(".")[0]
        if top == "fastpost":
            target = part_of(name)
            allowed = target == part or target in MAY_IMPORT[part] or (module, name) in DOORS
        else:
            allowed = top in sys.stdlib_module_names or part not in OUTSIDE or top in OUTSIDE[part]
        if not allowed:
            found.append(f"{module}:{line} imports {name}")
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module):
    path = modules()[module]
    assert complaints(path.read_text(), module, path.name == "__init__.py") == []


def test_there_is_no_way_round():
    """MAY_IMPORT itself has no cycle, so no chain of allowed imports can climb."""
    done: set[str] = set()
    while ready := [part for part in MAY_IMPORT.keys() - done if done.issuperset(MAY_IMPORT[part])]:
        done.update(ready)
    assert done == MAY_IMPORT.keys()


VIOLATIONS = [
    ("fastpost.losses.new", "from fastpost.head import token_stats", "fastpost.losses.new:1 imports fastpost.head"),
    ("fastpost.losses.new", "from fastpost import head", "fastpost.losses.new:1 imports fastpost.head"),
    ("fastpost.losses.new", "import fastpost", "fastpost.losses.new:1 imports fastpost"),
    ("fastpost.losses.new", "from .. import head", "fastpost.losses.new:1 imports fastpost.head"),
    ("fastpost.losses.new", "def f():\n    from ..head import x", "fastpost.losses.new:2 imports fastpost.head"),
    ("fastpost.head", "from fastpost.losses.sft import sft", "fastpost.head:1 imports fastpost.losses.sft"),
    ("fastpost.head", "import transformers.utils", "fastpost.head:1 imports transformers.utils"),
    ("fastpost.head", "import triton", "fastpost.head:1 imports triton"),
    ("fastpost.kernels.rows", "from fastpost.types import Head", "fastpost.kernels.rows:1 imports fastpost.types"),
    (
        "fastpost.models.heads",
        "from fastpost.trainers import loop",
        "fastpost.models.heads:1 imports fastpost.trainers",
    ),
    ("fastpost.types", "from fastpost.models.loading import f", "fastpost.types:1 imports fastpost.models.loading"),
    ("fastpost.attic", "import torch", "fastpost.attic is in no layer: give it a line in MAY_IMPORT"),
]


@pytest.mark.parametrize(("module", "source", "complaint"), VIOLATIONS)
def test_a_violation_is_caught(module, source, complaint):
    assert complaints(source, module) == [complaint]


def test_what_is_allowed_is_not_caught():
    source = "import math\nimport torch.nn.functional as F\nfrom fastpost.types import Batch\nfrom .kl import k3\n"
    assert complaints(source, "fastpost.losses.new") == []
    assert complaints("from .kl import k3", "fastpost.losses", is_package=True) == []
    assert complaints("import transformers", "fastpost.models.heads") == []


def test_every_door_is_in_use():
    for module, target in DOORS:
        assert target in {name for name, _ in imports(modules()[module].read_text(), module)}


def brought_in(statement: str) -> set[str]:
    """Top-level modules, other than the standard library's, that `statement` adds to those of `import torch`."""
    script = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        f"{statement}\n"
        "print(json.dumps([name for name in set(sys.modules) - before]))"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return {name.partition(".")[0] for name in json.loads(out)} - set(sys.stdlib_module_names)


def test_import_fastpost_brings_in_torch_alone():
    assert brought_in("import fastpost") == {"fastpost"}
    assert "yaml" in brought_in("import fastpost, yaml")
