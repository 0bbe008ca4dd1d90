"""kill -9 at random moments: what is left resumes, and ends with the bits of the run that nobody killed."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import talking
import tiny
from fastpost.cli import VERBS
from fastpost.trainers.config import Training
from killing import FASTPOST, ROOT, begun, ended, flags_of, killed, lines
from timeless import timeless

pytestmark = pytest.mark.slow
CALLING = (str(ROOT / "tests" / "calling.py"),)  # fastpost, with a policy that calls a tool
PAIRS = {"dataset": "pairs.jsonl"}
SAMPLED = {"dataset": "prompts.jsonl", "reward": "rewards.py:capitals", "max_completion_length": 6}
TALKS = {"model": "talker", "dataset": "talks.jsonl", "tools": "tools.py:roll", "max_completion_length": 80}
# a verb, and what tells its cases apart -> its own fields
CASES: dict[str, dict[str, Any]] = {
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
    "grpo, tools": SAMPLED | TALKS | {"num_generations": 2},
    "ppo, tools": SAMPLED | TALKS | {"lora_r": 2, "num_ppo_epochs": 1},
}
REWARDS = """
def capitals(completions, **columns):
    texts = [said if isinstance(said, str) else said[-1]["content"] for said in completions]
    return [sum('A' <= x <= 'Z' for x in text) / 6 for text in texts]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("model", "teacher")):
        tiny.model("qwen3", seed=seed).save_pretrained(directory / name)
        tiny.tokenizer().save_pretrained(directory / name)
    talking.model().save_pretrained(directory / "talker")
    talking.tokenizer().save_pretrained(directory / "talker")
    sums = [(f"{a}+{b}=", a + b) for a in range(5) for b in range(4)]
    rows = {
        "sums": [{"prompt": asked, "completion": str(c)} for asked, c in sums],
        "pairs": [{"prompt": asked, "chosen": str(c), "rejected": str(c + 1)} for asked, c in sums],
        "prompts": [{"prompt": asked} for asked, _ in sums],
        "talks": [{"prompt": [{"role": "user", "content": asked}]} for asked, _ in sums],
        "steps": [{"prompt": x, "completions": ["so", str(c)], "labels": [True, c % 2 == 0]} for x, c in sums],
    }
    for name, each in rows.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    (directory / "rewards.py").write_text(REWARDS)
    (directory / "tools.py").write_text(talking.ROLL)
    return directory


def started(case: str, files: Path, out: str) -> subprocess.Popen:
    fields = {"model": "model", "output_dir": out, "max_steps": 12, "save_steps": 1, "save_total_limit": 2}
    fields |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    fields |= CASES[case] | {"resume_from_checkpoint": "latest"}
    words = [case.split(",")[0], *flags_of(fields)]
    return begun(words, files, CALLING if "tools" in fields else FASTPOST)


def weights(directory: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.safetensors")}
    return {name: data for name, data in found.items() if not name.startswith("checkpoint")}


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [timeless(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_verb_that_trains_is_killed():
    trains = {name for name, (config, _) in VERBS.items() if issubclass(config, Training)}
    trains = {name for name in trains if not name.startswith("plan ")} - {"rejection"}  # test_rejection
    assert {case.split(",")[0] for case in CASES} == trains


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_resumes_to_the_same_bits(case: str, files: Path):
    straight, out = files / f"{case}, straight", files / f"{case}, killed"
    ended(started(case, files, straight.name))
    draw, metrics = random.Random(case), out / "metrics.jsonl"
    for _ in range(2):
        wanted = lines(metrics) + draw.randint(1, 3)  # from its first line on there is something to lose
        killed(started(case, files, out.name), lambda n=wanted: lines(metrics) >= n, draw)
    ended(started(case, files, out.name))
    assert weights(out) == weights(straight)
    assert [line["step"] for line in lines_of(out)] == list(range(1, 13))
    assert lines_of(out) == lines_of(straight)
    if "tools" in CASES[case]:
        assert all(line["tools/call_frequency"] >= 1 for line in lines_of(out))
