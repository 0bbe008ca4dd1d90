"""Every recipe runs as it stands, and what its files say of a larger model is fields of their verbs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from fastpost.cli import VERBS, read_config
from fastpost.trainers.config import Training

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
FILES = sorted(RECIPES.glob("*/[0-9]-*.yaml"))
NAMES = sorted({file.parent.name for file in FILES})
TOYS = ("constitution",)  # what a larger model would be taught by is not in their data
FIELD = re.compile(r"^# (\w+: .+)$", re.MULTILINE)


def verb_of(file: Path) -> str:
    return file.stem.partition("-")[2]


def test_the_lectures_pipelines_are_there():
    stages = {name: [verb_of(file) for file in FILES if file.parent.name == name] for name in NAMES}
    assert {name: stages[name] for name in ("sft-dpo", "sft-grpo", "sft-reward-ppo")} == {
        "sft-dpo": ["sft", "dpo"],
        "sft-grpo": ["sft", "grpo"],
        "sft-reward-ppo": ["sft", "reward", "ppo"],
    }
    assert stages["sft-best-of-n"] == ["sft", "best-of-n", "sft"]
    assert stages["sft-rejection"] == ["sft", "rejection"]
    assert stages["sft-prm-grpo"] == ["sft", "prm-label", "prm", "guided", "grpo"]
    assert stages["distill"] == ["sft", "sft", "distill"]
    assert stages["tools"] == ["sft", "grpo"]
    assert stages["reasoning"] == ["sft", "grpo", "rejection", "grpo", "best-of-n", "sft", "sft"]
    assert all(f"`{name}`" in (RECIPES / "README.md").read_text() for name in NAMES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_file_is_a_config_and_so_it_is_with_the_fields_of_a_larger_model(file: Path, tmp_path: Path):
    kind, text = VERBS[verb_of(file)][0], file.read_text()
    assert read_config(kind, ["--config", str(file)]).output_dir.startswith(f"runs/{file.parent.name}/")
    if file.parent.name in TOYS or not issubclass(kind, Training):
        return
    larger = FIELD.findall(text)
    merged = yaml.safe_load(text) | yaml.safe_load("\n".join(larger))
    if issubclass(kind, Training):
        assert any(field.startswith("max_tokens_per_batch") for field in larger)
        assert merged["load_in_4bit"] is True
        merged["lora_r"] = 16  # or the adapter of a stage before
    (tmp_path / "larger.yaml").write_text(yaml.safe_dump(merged))
    read_config(kind, ["--config", str(tmp_path / "larger.yaml")])


# What makes a recipe quick, of a verb that has these fields; from no right answer nothing is learnt.
QUICK = {"max_steps": 4, "confidence": 0.5}
STEPS = {"sft-rejection/1-sft": {"max_steps": 100}, "reasoning/1-sft": {"max_steps": 100}}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_one_command(name: str, tmp_path: Path):
    """Of a few steps a stage that trains, elsewhere than in the repository."""
    shutil.copytree(RECIPES, tmp_path / "recipes")
    stages = [file for file in FILES if file.parent.name == name]
    trained = [file for file in stages if issubclass(VERBS[verb_of(file)][0], Training)]
    for file in stages:
        copy, known = tmp_path / file.relative_to(ROOT), {field.name for field in fields(VERBS[verb_of(file)][0])}
        given = QUICK | STEPS.get(f"{name}/{file.stem}", {})
        quick = {field: value for field, value in given.items() if field in known}
        copy.write_text(yaml.safe_dump(yaml.safe_load(copy.read_text()) | quick))
    found = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "recipes/run.sh", name, "--seed", "1"],
        cwd=tmp_path,
        env=os.environ | found,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("fastpost ")] == [
        f"fastpost {verb_of(file)} --config recipes/{name}/{file.name} --seed 1" for file in stages
    ]
    scored = re.findall(rf"^runs/{name}/([\w-]+): [\d.]+% ", done.stdout, re.MULTILINE)
    assert len(scored) == sum(verb_of(file) not in ("reward", "prm") for file in trained)
