"""What every verb says at its door, before it reads or writes anything."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import tiny
from fastpost.cli import VERBS
from fastpost.trainers.config import Merge, Training
from killing import ROOT, flags_of

STAGES = ["best-of-n", "guided", "prm-label", "constitution", "rejection", "eval", "judge"]
TRAIN = [verb for verb, (kind, _) in VERBS.items() if issubclass(kind, Training) and verb not in STAGES]
TRAIN = [verb for verb in TRAIN if not verb.startswith("plan ")]


def called(verb: str, config: Any) -> Any:
    module, function = VERBS[verb][1].split(":")
    return getattr(importlib.import_module(module), function)(config)


@pytest.mark.parametrize("verb", [*TRAIN, *STAGES])
def test_a_config_of_another_verb_is_refused(verb: str):
    kind = VERBS[verb][0].__name__
    with pytest.raises(ValueError, match=f"config must be of {kind}, got Merge: each verb has its own"):
        called(verb, object.__new__(Merge))


@pytest.mark.parametrize("verb", STAGES)
def test_what_is_not_divided_is_run_by_one_process(verb: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"{verb} runs as one process, and 2 were started: leave out torchrun"):
        called(verb, object.__new__(VERBS[verb][0]))


@pytest.mark.slow
def test_torchrun_of_a_stage_leaves_nothing(tmp_path: Path):
    tiny.model("qwen3").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    fields = {"model": "model", "dataset": "prompts.jsonl", "reward": "exact_match", "output_dir": "out"}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words += ["fastpost.cli", "best-of-n", *flags_of(fields)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode != 0 and not (tmp_path / "out").exists()
    assert "fastpost best-of-n: best-of-n runs as one process, and 2 were started" in found.stderr
