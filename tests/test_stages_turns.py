"""Stages and evaluation with tools: answers are conversations, kept as they went, and only the policy's part counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import talking
import tiny
from fastpost.cli import main
from fastpost.data import sft_examples
from fastpost.files import read_rows
from fastpost.models.loading import load_model
from fastpost.rollout import Completion
from fastpost.rollout.sampler import Generate
from fastpost.stages import rejection as rounds
from fastpost.stages.hints import hinted
from fastpost.trainers.config import Sft
from rules import assert_close_to_truth

# It does not say the same twice, and the reward is what it said.
TOOLS = '''
import os


def roll(sides: int) -> str:
    """Rolls a die.

    Args:
        sides: How many sides it has.
    """
    return str(int.from_bytes(os.urandom(3)))


def rolled(prompts, completions, **_):
    assert all(message["role"] != "tool" for prompt in prompts for message in prompt)
    said = [[m["content"] for m in messages if m["role"] == "tool"] for messages in completions]
    return [float(each[0]) for each in said]
'''
CALLS, ENDS = talking.call("roll", sides=6), "so 12"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    tokenizer = talking.tokenizer()
    shape = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny.model("qwen3", vocab_size=len(tokenizer), max_position_embeddings=256, **shape)
    for name, template in (("marked", talking.MARKED), ("unmarked", talking.TEMPLATE)):
        tokenizer.chat_template = template
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    rows = [{"prompt": [{"role": "user", "content": f"{i}*3"}], "answer": str(3 * i)} for i in range(4)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "tools.py").write_text(TOOLS)
    return directory


@pytest.fixture(autouse=True)
def turns(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A random model hardly writes a call, nor ends: these are its turns. What it was asked is in the list."""
    seen: list[str] = []

    def said(self: Any, prompt_ids: Any, sampling: Any, n: int = 1, keys: Any = None) -> list[Completion]:
        texts = [self.tokenizer.decode(ids) for ids in prompt_ids for _ in range(n)]
        seen.extend(texts)
        turns = [self.tokenizer(ENDS if "<|tool|>" in text else CALLS).input_ids for text in texts]
        return [Completion([*ids, self.tokenizer.eos_token_id], True, [-1.0] * (len(ids) + 1)) for ids in turns]

    monkeypatch.setattr(Generate, "__call__", said)
    return seen


def words(files: Path, out: Path, model: str = "marked", **more: Any) -> list[str]:
    given = {
        "model": files / model,
        "dataset": files / "prompts.jsonl",
        "reward": f"{files / 'tools.py'}:rolled",
        "tools": f"{files / 'tools.py'}:roll",
        "output_dir": out,
        "num_generations": 3,
        "max_completion_length": 80,
    }
    return [str(word) for name, value in (given | more).items() for word in (f"--{name}", value)]


def journal(file: Path) -> dict[str, Any]:
    return dict(json.loads(line) for line in file.read_text().splitlines()[1:])


def test_the_best_conversation_is_kept_as_it_went_and_is_there_again(files: Path, tmp_path: Path, turns: list[str]):
    assert main(["best-of-n", *words(files, tmp_path)]) == 0
    rows, work, kept = read_rows(tmp_path / "best.jsonl"), journal(tmp_path / "work.jsonl"), tmp_path / "best.jsonl"
    assert all(text.startswith("<|system|>roll <eos><|user|>") for text in turns)
    function = {"name": "roll", "arguments": {"sides": 6}}
    for i, row in enumerate(rows):
        first, said, last = row["completion"]
        assert first == {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        assert said["role"] == "tool" and float(said["content"]) == row["reward"] and last["role"] == "assistant"
        assert row["reward"] == max(answer["reward"] for answer in work[f"0/{i}"])
        assert [tool["function"]["name"] for tool in row["tools"]] == ["roll"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tools/call_frequency"] == 1 and report["turns/mean"] == 2
    said = [len(talking.tokenizer()(text).input_ids) + 1 for text in (CALLS, ENDS)]
    assert report["mean_length"] == sum(said)  # nothing of what the tool said
    asked, before = len(turns), kept.read_bytes()
    assert main(["best-of-n", *words(files, tmp_path)]) == 0
    assert len(turns) == asked and kept.read_bytes() == before


def test_rejection_trains_on_what_the_policy_said_of_them(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs: list[Sft] = []
    train = rounds.sft
    monkeypatch.setattr(rounds, "sft", lambda config: runs.append(config) or train(config))
    more: dict[str, Any] = {"rounds": 1, "max_steps": 1, "per_device_train_batch_size": 4}
    assert main(["rejection", *words(files, tmp_path, **more)]) == 0
    (config,) = runs
    assert config.assistant_only_loss
    (_, line) = json.loads((tmp_path / "report.json").read_text())
    assert (line["rows"], line["calls"]) == (4, 1)
    _, tokenizer = load_model(files / "marked", dtype="float32")
    rows = read_rows(tmp_path / "round-1.jsonl")
    examples, _ = sft_examples(rows, tokenizer, None, None, config.assistant_only_loss)
    for row, example in zip(rows, examples, strict=True):
        learnt = tokenizer.decode([example.input_ids[t] for t in example.predicted])
        assert f"<|tool|>{row['completion'][1]['content']}<eos>" in tokenizer.decode(example.input_ids)
        assert learnt == f"{CALLS}<eos>{ENDS}<eos>"


def test_rejection_needs_a_template_that_tells_who_says_what(
    files: Path, tmp_path: Path, turns: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main(["rejection", *words(files, tmp_path, "unmarked")]) == 2
    assert "{% generation %}" in capsys.readouterr().err and not turns


def test_eval_asks_with_tools_and_measures_what_the_model_said(files: Path, tmp_path: Path):
    more = {"right_above": 2**23, "num_generations": 2, "reference": files / "unmarked"}
    assert main(["eval", *words(files, tmp_path, **more)]) == 0
    metrics = json.loads((tmp_path / "report.json").read_text())["models"]["marked"]["metrics"]
    assert (metrics["calls"]["value"], metrics["turns"]["value"], metrics["failures"]["value"]) == (1, 2, 0)
    assert metrics["sampled/calls"]["value"] == 1
    assert metrics["kl"]["value"] == 0  # the same weights
    work = journal(tmp_path / "models" / "marked" / "work.jsonl")
    right = [float(work[f"greedy/{i}"][0]["messages"][1]["content"]) > 2**23 for i in range(4)]
    assert metrics["accuracy"]["value"] == sum(right) / 4
    model, tokenizer = load_model(files / "marked", dtype="float32")
    for i, row in enumerate(read_rows(files / "prompts.jsonl")):
        (answer,), (measured,) = work[f"greedy/{i}"], work[f"measured-greedy/{i}"]
        prompt = tokenizer(f"<|system|>roll <eos><|user|>{row['prompt'][0]['content']}<eos><|assistant|>").input_ids
        assert 0 < answer["tokens"] == sum(answer["own"]) < len(answer["ids"])
        same, truth = (_own_logp(model.to(dtype), prompt, answer) for dtype in (torch.float32, torch.float64))
        assert_close_to_truth(torch.tensor(measured["logp"]), same, truth)


@torch.no_grad()
def _own_logp(model: Any, prompt: list[int], answer: dict[str, Any]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *answer["ids"]]])
    logp = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logp.gather(1, ids[0, len(prompt) :, None])[torch.tensor(answer["own"])].sum()


def test_a_hint_is_asked_with_the_tools(files: Path):
    from fastpost.data import prompt_examples

    _, tokenizer = load_model(files / "marked", dtype="float32")
    schemas = [{"type": "function", "function": {"name": "roll"}}]
    prompts, _ = prompt_examples(read_rows(files / "prompts.jsonl"), tokenizer, None, tools=schemas)
    found = hinted(prompts[:1], "{prompt} is {answer}", tokenizer, schemas)
    assert tokenizer.decode(found[0].input_ids) == "<|system|>roll <eos><|user|>0*3 is 0<eos><|assistant|>"
    assert found[0].prompt == prompts[0].prompt
