"""A policy is trained by a judge: GRPO with `--reward judge.yaml`, over HTTP, in which nothing is asked twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import tiny
from endpoints import Handler, asked, serving
from fastpost.cli import main


def shorter(handler: Handler, body: dict) -> None:
    """A judge of brevity, to which some answers say nothing."""
    answer = asked(body)[1]
    handler.say("?" if answer.startswith("a") else f"Score: {max(1, 10 - len(answer))}")


def test_grpo_learns_what_a_judge_likes(tmp_path: Path):
    tiny.model("qwen3").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = "".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(16))
    (tmp_path / "prompts.jsonl").write_text(rows)
    with serving(shorter) as server:
        lines = f"model: m\nendpoint: {server.url}\nrubric: Be brief.\ncache_dir: {tmp_path / 'cache'}\nreasks: 0\n"
        (tmp_path / "brevity.yaml").write_text(lines)
        fields = {"model": "model", "dataset": "prompts.jsonl", "reward": "brevity.yaml"}
        words = [word for name, path in fields.items() for word in (f"--{name}", str(tmp_path / path))]
        words += [
            "--max_steps",
            "8",
            "--num_generations",
            "8",
            "--per_device_train_batch_size",
            "32",
            "--logging_steps",
            "1",
        ]
        words += ["--max_completion_length", "8", "--learning_rate", "1e-2", "--save_steps", "100"]
        assert main(["grpo", *words, "--output_dir", str(tmp_path / "first")]) == 0
        questions = len(server.seen)
        assert main(["grpo", *words, "--output_dir", str(tmp_path / "second")]) == 0
        assert len(server.seen) == questions <= 8 * 32
    runs = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").open()] for run in ("first", "second")]
    rewards = [[line["rewards/brevity/mean"] for line in run if "reward" in line] for run in runs]
    assert rewards[0] == rewards[1] and rewards[0][-1] > rewards[0][0] + 0.2
    assert any(line.get("judge/missing_votes") for line in runs[0])
