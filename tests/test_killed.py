"""kill -9 at random moments: what is left resumes, and ends with the bits of the run that nobody killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import tiny
from fastpost.cli import VERBS as commands
from fastpost.trainers.config import Training
from timeless import timeless

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
PAIRS = {"dataset": "pairs.jsonl"}
SAMPLED = {"dataset": "prompts.jsonl", "reward": "rewards.py:capitals", "max_completion_length": 6}
# verb -> its own fields
VERBS: dict[str, dict[str, object]] = {
    "sft": {"dataset": "sums.jsonl"},
    "dpo": PAIRS,
    "cpo": PAIRS,
    "simpo": PAIRS,
    "orpo": PAIRS,
    "kto": PAIRS,
    "reward": PAIRS,
    "prm": {"dataset": "steps.jsonl"},
    "distill": {"dataset": "sums.jsonl", "teacher_model": "teacher", "lmbda": 0.5, "max_completion_length": 6},
    "online-dpo": SAMPLED,
    "grpo": SAMPLED | {"num_generations": 2},
    "rloo": SAMPLED,
    "reinforce": SAMPLED,
    "ppo": SAMPLED | {"lora_r": 2, "num_ppo_epochs": 1},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("model", "teacher")):
        tiny.model("qwen3", seed=seed).save_pretrained(directory / name)
        tiny.tokenizer().save_pretrained(directory / name)
    sums = [(f"{a}+{b}=", a + b) for a in range(5) for b in range(4)]
    rows = {
        "sums": [{"prompt": asked, "completion": str(c)} for asked, c in sums],
        "pairs": [{"prompt": asked, "chosen": str(c), "rejected": str(c + 1)} for asked, c in sums],
        "prompts": [{"prompt": asked} for asked, _ in sums],
        "steps": [{"prompt": x, "completions": ["so", str(c)], "labels": [True, c % 2 == 0]} for x, c in sums],
    }
    for name, each in rows.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    (directory / "rewards.py").write_text(
        "def capitals(completions, **columns):\n    return [sum('A' <= x <= 'Z' for x in t) / 6 for t in completions]\n"
    )
    return directory


def command(verb: str, out: str) -> list[str]:
    fields = {"model": "model", "output_dir": out, "max_steps": 12, "save_steps": 1, "save_total_limit": 2}
    fields |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    fields |= VERBS[verb] | {"resume_from_checkpoint": "latest"}
    flags = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "fastpost.cli", verb, *flags]


def begun(verb: str, files: Path, out: str) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(command(verb, out), cwd=files, env=environment, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> None:
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said


def weights(directory: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.safetensors")}
    return {name: data for name, data in found.items() if not name.startswith("checkpoint")}


def lines_of(out: Path) -> list[dict[str, object]]:
    return [timeless(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_verb_that_trains_is_killed():
    trains = {name for name, (config, _) in commands.items() if issubclass(config, Training)}
    assert VERBS.keys() == {name for name in trains if not name.startswith("plan ")} - {"rejection"}  # test_rejection


@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_run_resumes_to_the_same_bits(verb: str, files: Path):
    straight = begun(verb, files, f"{verb}-straight")
    ended(straight)
    draw, out = random.Random(verb), files / f"{verb}-killed"
    for _ in range(2):
        process = begun(verb, files, out.name)
        # from its first line on there is something to lose
        lines = len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0
        wanted, until = lines + draw.randint(1, 3), time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= wanted:
                break
            time.sleep(0.01)
        time.sleep(draw.random() * 0.05)  # somewhere in a step, in a save, or between them
        process.send_signal(signal.SIGKILL)
        process.communicate()
    ended(begun(verb, files, out.name))
    assert weights(out) == weights(files / f"{verb}-straight")
    assert [line["step"] for line in lines_of(out)] == list(range(1, 13))
    assert lines_of(out) == lines_of(files / f"{verb}-straight")
