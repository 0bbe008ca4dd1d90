"""Verbs that train on conversations with tools: whole runs, exact resume, and tools that a Python caller gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import talking
from calling import rolls_first
from fastpost.rollout.sampler import Generate
from fastpost.trainers.config import Grpo, Ppo
from fastpost.trainers.grpo import grpo
from fastpost.trainers.log import read_lines
from fastpost.trainers.ppo import ppo
from timeless import timeless

# It does not say the same twice: a run that resumes must have what was said before.
TOOLS = '''
import os


def roll(sides: int) -> str:
    """Rolls a die.

    Args:
        sides: How many sides it has.
    """
    return os.urandom(2).hex()


def length(completions, **_):
    return [float(len(messages[-1]["content"]) % 7) for messages in completions]
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    talking.model().save_pretrained(directory / "model")
    talking.tokenizer().save_pretrained(directory / "model")
    rows = [{"prompt": [{"role": "user", "content": f"{i}*3"}]} for i in range(8)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "tools.py").write_text(TOOLS)
    return directory


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generate, "__call__", rolls_first(Generate.__call__))


def fields_of(files: Path, out: Path, **changes: Any) -> dict[str, Any]:
    fields = {
        "model": files / "model",
        "dataset": files / "prompts.jsonl",
        "output_dir": out,
        "reward": f"{files / 'tools.py'}:length",
        "tools": f"{files / 'tools.py'}:roll",
        "per_device_train_batch_size": 4,
        "max_completion_length": 80,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }
    return fields | changes


def test_a_run_resumes_to_the_bit_with_tools_that_never_say_the_same_twice(files: Path, tmp_path: Path, calls: None):
    whole = grpo(Grpo(**fields_of(files, tmp_path / "out", num_generations=2)))
    lines = [timeless(line) for line in read_lines(tmp_path / "out" / "metrics.jsonl")]
    for gone in ("checkpoint-4", "model.safetensors"):
        path = tmp_path / "out" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = grpo(Grpo(**fields_of(files, tmp_path / "out", num_generations=2, resume_from_checkpoint="latest")))
    for (name, a), (_, b) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert [timeless(line) for line in read_lines(tmp_path / "out" / "metrics.jsonl")] == lines
    assert all(line["tools/call_frequency"] >= 1.0 for line in lines if "reward" in line)
    assert all(line["turns/mean"] >= 2.0 for line in lines if "reward" in line)


def test_ppo_takes_conversations(files: Path, tmp_path: Path, calls: None):
    ppo(Ppo(**fields_of(files, tmp_path / "out", lora_r=2, num_ppo_epochs=1, max_steps=1, save_steps=1)))
    (line,) = [line for line in read_lines(tmp_path / "out" / "metrics.jsonl") if "objective/kl" in line]
    assert line["tools/call_frequency"] >= 1.0
    assert line["val/ratio"] == pytest.approx(1.0, abs=1e-5)


def test_a_caller_gives_functions(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: None):
    monkeypatch.syspath_prepend(str(files))
    import importlib

    tools = importlib.import_module("tools")
    seen: list[Any] = []

    def reward(completions: list[Any], **_: Any) -> list[float]:
        seen.extend(completions)
        return [float(i) for i in range(len(completions))]

    fields = fields_of(files, tmp_path / "out", num_generations=2, max_steps=1, save_steps=1, reward=(), tools=())
    grpo(Grpo(**fields), tools=[tools.roll], reward_funcs=reward)
    assert [message["role"] for message in seen[0]][:3] == ["assistant", "tool", "assistant"]
    assert seen[0][0]["tool_calls"][0]["function"] == {"name": "roll", "arguments": {"sides": 6}}


def test_a_model_answers_as_the_user(files: Path, tmp_path: Path):
    fields = fields_of(files, tmp_path / "out", num_generations=2, max_steps=1, save_steps=1, tools=())
    grpo(Grpo(**fields, user=str(files / "model"), max_user_turns=2))
    (line,) = [line for line in read_lines(tmp_path / "out" / "metrics.jsonl") if "reward" in line]
    assert line["turns/mean"] >= 1
