"""kill -9 in every stage that is not training: the same command goes on, pays for no answer twice, and leaves the files
of the run that nobody killed, byte for byte."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import tiny
from fastpost.cli import VERBS
from fastpost.trainers.config import Training
from killing import begun, ended, flags_of, killed, lines

pytestmark = pytest.mark.slow

AT_ONCE = 8  # answers that are journaled together, at most
ASKS = {"generation_batch_size": 4, "max_completion_length": 24, "seed": 3, "output_dir": "out"}
POLICY = ASKS | {"model": "../model", "dataset": "../sums.jsonl", "reward": "../mine.py:vowels"}
STEPWISE = POLICY | {"step_separator": "a"}
PRINCIPLED = POLICY | {"constitution": "../principles.yaml"}
# a verb, and what tells its cases apart -> its fields
STAGES: dict[str, dict[str, Any]] = {
    "best-of-n": POLICY | {"num_generations": AT_ONCE},
    "guided": STEPWISE | {"num_beams": 2, "num_expansions": 2, "max_solution_steps": 6},
    "prm-label": STEPWISE | {"num_generations": 3},
    "constitution, revise": PRINCIPLED | {"phase": "revise", "revisions": 2, "benign_dataset": "../benign.jsonl"},
    "constitution, prefer": PRINCIPLED | {"phase": "prefer", "num_generations": 4},
    "eval": POLICY | {"model": ("../model", "../other"), "reference": "../model", "num_generations": 4},
}
# killed there, with what only they have
ELSEWHERE = {"rejection": "test_rejection.py", "judge": "test_judging_command.py"}
SHORT = {"merge", "demo", "report", "doctor"}  # nothing of theirs goes on
# What it was paid for is on the disk whatever becomes of the process.
REWARD = """
def vowels(completions, **_):
    with open("paid", "a") as file:
        file.write("\\n" * len(completions))
    return [sum(x in "aeiou" for x in text) / 8 for text in completions]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("model", "other")):
        tiny.model("qwen3", seed=seed, max_position_embeddings=1024).save_pretrained(directory / name)
        tiny.tokenizer().save_pretrained(directory / name)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(3)]
    for name, some in (("sums", rows), ("benign", rows[:4])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (directory / "principles.yaml").write_text("- Answers are polite.\n- Answers are short.\n")
    (directory / "mine.py").write_text(REWARD)
    return directory


def test_every_stage_is_killed_somewhere():
    trains = {verb for verb, (config, _) in VERBS.items() if issubclass(config, Training)}
    stages = {verb for verb in VERBS.keys() - trains - SHORT if not verb.startswith("plan ")}
    assert {case.split(",")[0] for case in STAGES} | ELSEWHERE.keys() == stages | {"rejection"}
    tests = Path(__file__).parent
    assert all("killed(begun(" in (tests / name).read_text() for name in ELSEWHERE.values())


def journaled(directory: Path) -> dict[Path, bytes]:
    return {file.relative_to(directory): file.read_bytes() for file in directory.rglob("work.jsonl")}


def left(directory: Path) -> dict[Path, bytes]:
    return {file.relative_to(directory): file.read_bytes() for file in (directory / "out").rglob("*.*")}


@pytest.mark.parametrize("case", STAGES)
def test_a_killed_stage_leaves_what_it_would_have_left(case: str, files: Path):
    words = [case.split(",")[0], *flags_of(STAGES[case])]
    straight, stopped = (files / f"{case}, {name}" for name in ("straight", "killed"))
    straight.mkdir()
    stopped.mkdir()
    printed = ended(begun(words, straight))
    work = sum(whole.count(b"\n") for whole in journaled(straight).values())
    draw = random.Random(case)
    for share in (0.1, 0.5):
        wanted = share * work + draw.randint(1, 5)
        killed(begun(words, stopped), lambda n=wanted: lines(*stopped.rglob("work.jsonl")) >= n, draw)
        for name, whole in journaled(stopped).items():
            assert journaled(straight)[name].startswith(whole[: whole.rfind(b"\n") + 1])
    assert ended(begun(words, stopped)) == printed
    assert left(stopped) == left(straight)
    assert lines(stopped / "paid") <= lines(straight / "paid") + 2 * AT_ONCE  # what was under way
