"""What the verbs log: every metric that a warning, a panel, the terminal or a card asks for is really there."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import tiny
from fastpost.judging import Preference
from fastpost.report import panels, parts
from fastpost.report.page import page
from fastpost.report.record import read_record
from fastpost.trainers.config import Distill, Dpo, Grpo, Kto, OnlineDpo, Ppo, Reinforce, Reward, Rloo, Sft
from fastpost.trainers.distill import distill
from fastpost.trainers.dpo import dpo
from fastpost.trainers.grpo import grpo
from fastpost.trainers.kto import kto
from fastpost.trainers.log import read_lines
from fastpost.trainers.online_dpo import online_dpo
from fastpost.trainers.ppo import ppo
from fastpost.trainers.reinforce import reinforce
from fastpost.trainers.reward import reward
from fastpost.trainers.rloo import rloo
from fastpost.trainers.sft import sft
from fastpost.watching import board, hub, levels
from fastpost.watching.warnings import CHECKS

SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(4) for b in range(2)]
ROWS = {
    "sums": [{"prompt": asked, "completion": said} for asked, said in SUMS],
    "pairs": [{"prompt": asked, "chosen": said, "rejected": "a longer one"} for asked, said in SUMS[::2]]
    + [{"prompt": asked, "chosen": f"{said}, surely", "rejected": "?"} for asked, said in SUMS[1::2]],
    "prompts": [{"prompt": asked} for asked, _ in SUMS],
}
BRIEF = {"max_steps": 3, "logging_steps": 1, "eval_steps": 3, "per_device_train_batch_size": 4, "save_steps": 0}
BRIEF |= {"gradient_checkpointing": False}
# So that some completions end, and some do not.
ENDING = {"max_completion_length": 6, "stop": tuple("0123456789abcdefgh")}
SAMPLED = ENDING | {"num_generations": 2}
PPO = ENDING | {"lora_r": 2, "target_kl": 6.0, "num_ppo_epochs": 1, "num_mini_batches": 1}
RUNS: dict[str, tuple[Callable[..., Any], type, str, dict[str, Any]]] = {
    "sft": (sft, Sft, "sums", {}),
    "dpo": (dpo, Dpo, "pairs", {}),
    "kto": (kto, Kto, "pairs", {}),
    "reward": (reward, Reward, "pairs", {}),
    "distill": (distill, Distill, "sums", {"lmbda": 0.5, "max_completion_length": 4, "seed": 1}),
    "grpo": (grpo, Grpo, "prompts", SAMPLED | {"beta": 0.1, "rollout_correction": "token_truncate"}),
    "rloo": (rloo, Rloo, "prompts", SAMPLED | {"beta": 0.1}),
    "reinforce": (reinforce, Reinforce, "prompts", SAMPLED | {"kl_coef": 0.1}),
    "ppo": (ppo, Ppo, "prompts", PPO),
    "online-dpo": (online_dpo, OnlineDpo, "prompts", SAMPLED),
}
# Of a mixture of experts alone, whose verbs log it too (tests/test_router.py).
OF_EXPERTS = {"aux_loss"}


def letters(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(str.isalpha, completion))) for completion in completions]


def ends(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def by_place(prompts: list[str], firsts: list[str], seconds: list[str]) -> list[Preference]:
    return [Preference(0.6, orders=(0.9, 0.3)) for _ in prompts]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directory of a short run of every verb."""
    directory = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("model", "teacher")):
        tiny.model("qwen3", seed).save_pretrained(directory / name)
        tiny.tokenizer().save_pretrained(directory / name)
    for name, rows in ROWS.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for verb, (function, config, rows, changes) in RUNS.items():
        file = directory / f"{rows}.jsonl"
        fields = {"model": directory / "model", "dataset": file, "eval_dataset": file, "output_dir": directory / verb}
        fields |= {"teacher_model": directory / "teacher"} if verb == "distill" else {}
        given = {"reward_funcs": [letters, ends]} if rows == "prompts" else {}
        given |= {"prefer": by_place} if verb == "online-dpo" else {}
        function(config(**fields | BRIEF | changes), **given)
    return {verb: directory / verb for verb in RUNS}


@pytest.fixture(scope="module")
def logged(runs: dict[str, Path]) -> dict[str, set[str]]:
    """The names of what each verb logs, once there was a number."""
    lines = {verb: read_lines(out / "metrics.jsonl") for verb, out in runs.items()}
    return {
        verb: {name for line in found for name, value in line.items() if value is not None}
        for verb, found in lines.items()
    }


def read_by(check: Callable[..., Any]) -> Iterator[str]:
    """The metrics that a check asks a run for: the words in its calls of `run`."""
    for node in ast.walk(ast.parse(inspect.getsource(check))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run":
            yield from (word.value for word in node.args if isinstance(word, ast.Constant))


@pytest.mark.parametrize("name", CHECKS)
def test_a_warning_reads_what_some_verb_logs(name: str, logged: dict[str, set[str]]):
    names = set(levels.NUMBERS) if name == "not a number" else set(read_by(CHECKS[name]))
    assert names
    assert names - set().union(*logged.values()) == set()


def shown() -> set[str]:
    """What the page, the terminal and the card of a model ask for by name."""
    drawn = [panel for section in panels.SECTIONS for panel in section.panels]
    names = {name for panel in drawn for name in (*panel.curves, *(panel.band or ()))}
    names |= {name for section in panels.SECTIONS for metrics in section.against.values() for name in metrics}
    names |= {name for row in board.ROWS.values() for name in row} | set(hub.SHOWN)
    return names | {name for name, _, _ in parts.JUDGED_BY}


def test_what_is_shown_is_what_some_verb_logs(logged: dict[str, set[str]]):
    assert shown() - OF_EXPERTS - set().union(*logged.values()) == set()


OF_POLICIES = {"Reward", "KL", "Reward against KL", "Reward against length", "Completions", "Entropy"}
OF_POLICIES |= {"Correlation with the reward", "Reward functions", "Cut off at the limit"}
OF_PAIRS = {"Implicit rewards", "Margin", "Log-probabilities", "Entropy"}
# A verb -> charts that its page has among others.
CHARTS = {
    "sft": {"Loss", "Right tokens", "Entropy"},
    "dpo": OF_PAIRS | {"Accuracy", "Less likely than under the reference"},
    "kto": OF_PAIRS,
    "reward": {"Margin", "Accuracy", "Accuracy by length", "Scores"},
    "distill": {"Loss", "Apart from the teacher", "Completions"},
    "grpo": OF_POLICIES | {"Groups without variance", "Importance weight", "Sampler and trainer differ"},
    "rloo": OF_POLICIES | {"Sampler and trainer differ"},
    "reinforce": OF_POLICIES | {"Sampler and trainer differ"},
    "ppo": OF_POLICIES | {"Coefficient of the KL", "Losses", "Variance that the critic explains"},
    "online-dpo": OF_POLICIES - {"Entropy"} | OF_PAIRS,
}
OF_SAMPLES = {"distill", "grpo", "rloo", "reinforce", "ppo", "online-dpo"}


@pytest.mark.parametrize("verb", RUNS)
def test_the_page_of_a_run_shows_what_its_verb_is_about(verb: str, runs: dict[str, Path]):
    text = page(read_record(runs[verb]))
    drawn = text.partition("<summary>")[0]
    titles = set(re.findall(r"<h3>([^<]+)", drawn))
    assert CHARTS[verb] - titles == set()
    sections = re.findall(r"<h2>([^<]+)", drawn)
    assert {"Where time goes", "Data", "Config"} | ({"Samples"} if verb in OF_SAMPLES else set()) <= set(sections)
    assert "<caption>train</caption><tr><td>rows</td><td>8</td>" in drawn
    assert "8 of 8 held-out rows are in the training data" in drawn
    assert "no reward" not in drawn


def test_samples_of_a_student_are_those_of_their_step(runs: dict[str, Path]):
    """By the number of the step that is done, as for a policy: a resume drops those of steps that come again."""
    steps = [line["step"] for line in read_lines(runs["distill"] / "completions.jsonl")]
    assert steps and 1 <= min(steps) <= max(steps) <= 3
