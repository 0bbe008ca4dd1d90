"""`fastpost rejection`: rounds of what its parts do, the same wherever they were stopped."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

pytest.importorskip("transformers")

import tiny
from fastpost.cli import main
from fastpost.files import read_rows
from fastpost.models.loading import load_model
from fastpost.rollout import Sampling, generate
from fastpost.stages.config import Rejection
from fastpost.stages.rejection import rejection
from fastpost.trainers.config import Sft
from fastpost.trainers.loop import seed_of
from fastpost.trainers.sft import sft
from killing import begun, ended, flags_of, killed, lines

ROOT = Path(__file__).resolve().parents[1]
# A reward that a random model gets now and then, and that must not see a hint.
REWARDS = """
def digits(prompts, completions, **columns):
    assert not any("hint" in str(prompt) for prompt in prompts)
    return [float(sum(c.isdigit() for c in (t if isinstance(t, str) else t[0]["content"]))) for t in completions]
"""
STOP = tuple("abcdefghijklm")  # a random model hardly ever ends by itself
FIELDS = {
    **{"num_generations": 4, "select": "threshold", "select_threshold": 1, "rounds": 2, "seed": 3},
    **{"max_completion_length": 16, "generation_batch_size": 16, "stop": STOP},
    **{"max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    tiny.model("qwen3").save_pretrained(directory / "model")
    tiny.tokenizer().save_pretrained(directory / "model")
    (directory / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(16)]
    talk = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in rows]
    for name, some in (("prompts", rows), ("held_out", rows[:5]), ("talk", talk)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return directory


def config_of(files: Path, out: Path, **changes: Any) -> Rejection:
    fields: dict[str, Any] = {"model": str(files / "model"), "dataset": str(files / "prompts.jsonl")}
    fields |= {"reward": (f"{files}/rewards.py:digits",), "output_dir": str(out)}
    return Rejection(**(fields | FIELDS | changes))


@pytest.fixture(scope="module")
def straight(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds that nobody stopped, with held-out prompts."""
    out = tmp_path_factory.mktemp("straight")
    rejection(config_of(files, out, eval_dataset=str(files / "held_out.jsonl")))
    return out


def work_of(out: Path) -> dict[str, Any]:
    return dict(map(json.loads, (out / "work.jsonl").read_text().splitlines()[1:]))


def weights(model: Path) -> bytes:
    return next(model.glob("*model.safetensors")).read_bytes()


def assert_the_same(out: Path, straight: Path) -> None:
    for name in ("round-1", "round-2", "."):
        assert weights(out / name) == weights(straight / name)
    for name in ("round-1.jsonl", "round-2.jsonl", "report.json"):
        assert (out / name).read_bytes() == (straight / name).read_bytes()


# ---- what a round is ----


def test_a_round_trains_on_the_good_answers_of_the_model_before(files: Path, straight: Path):
    work = work_of(straight)
    for number in (1, 2):
        rows = read_rows(straight / f"round-{number}.jsonl")
        wanted = []
        for i in range(16):
            answers = [answer for answer in work[f"round-{number}/{i}"] if answer["finished"] and answer["reward"] >= 1]
            texts = dict.fromkeys(answer["text"] for answer in sorted(answers, key=lambda a: -a["reward"]))
            wanted += [(f"{i}+{i}=", text) for text in texts]
        assert wanted and [(row["prompt"], row["completion"]) for row in rows] == wanted
    model, tokenizer = load_model(straight / "round-1", dtype="float32")
    ids = [tokenizer(f"{i}+{i}=").input_ids for i in range(16)]
    sampling = Sampling(max_completion_length=16, stop=STOP, seed=seed_of(3, "round-2"))
    found = generate(model, tokenizer, ids, sampling, num_generations=4, batch_size=16)
    texts = tokenizer.batch_decode([completion.ids for completion in found], skip_special_tokens=True)
    assert texts == [answer["text"] for i in range(16) for answer in work[f"round-2/{i}"]]


@pytest.mark.parametrize("train_from", ["base", "last"])
def test_its_training_is_that_of_fastpost_sft(files: Path, straight: Path, tmp_path: Path, train_from: str):
    out = straight
    if train_from == "last":
        out = tmp_path / "last"
        rejection(config_of(files, out, train_from="last"))
        assert weights(out / "round-1") == weights(straight / "round-1")
        assert weights(out / "round-2") != weights(straight / "round-2")
    model = out / "round-1" if train_from == "last" else files / "model"
    fields = {name: FIELDS[name] for name in ("max_steps", "per_device_train_batch_size", "learning_rate")}
    sft(Sft(model=str(model), dataset=str(out / "round-2.jsonl"), output_dir=str(tmp_path / "sft"), seed=5, **fields))
    assert weights(tmp_path / "sft") == weights(out / "round-2") == weights(out)


def test_the_report_is_of_all_answers_and_of_the_held_out(straight: Path):
    lines, work = json.loads((straight / "report.json").read_text()), work_of(straight)
    assert [line["round"] for line in lines] == [0, 1, 2]
    for line in lines:
        held_out = [work[f"held-out-{line['round']}/{i}"] for i in range(5)]
        assert all(len(answers) == 1 for answers in held_out)
        assert line["held_out"] == pytest.approx(fmean(answers[0]["reward"] for answers in held_out))
    for line in lines[1:]:
        groups = [work[f"round-{line['round']}/{i}"] for i in range(16)]
        assert line["reward"] == pytest.approx(fmean(answer["reward"] for group in groups for answer in group))
        good = [any(a["finished"] and a["reward"] >= 1 for a in group) for group in groups]
        assert line["yield"] == pytest.approx(fmean(good)) and 0 < line["yield"] < 1
        assert line["distinct_answers"] == pytest.approx(fmean(len({a["text"] for a in g}) / 4 for g in groups))
        assert line["rows"] == len(read_rows(straight / f"round-{line['round']}.jsonl")) and line["hinted"] == 0


def test_a_hint_is_asked_with_and_not_trained_on(files: Path, tmp_path: Path):
    hint = "{prompt}hint: {answer} "
    lines = rejection(config_of(files, tmp_path, rounds=1, hint=hint))
    work = work_of(tmp_path)
    failed = [i for i in range(16) if not any(a["finished"] and a["reward"] >= 1 for a in work[f"round-1/{i}"])]
    assert {key for key in work if "hint" in key} == {f"round-1-hint/{i}" for i in failed}
    model, tokenizer = tiny.model("qwen3"), tiny.tokenizer()
    ids = [tokenizer(hint.format(prompt=f"{i}+{i}=", answer=2 * i)).input_ids for i in failed]
    sampling = Sampling(max_completion_length=16, stop=STOP, seed=seed_of(3, "round-1-hint"))
    found = generate(model, tokenizer, ids, sampling, num_generations=4, keys=failed, batch_size=16)
    texts = tokenizer.batch_decode([completion.ids for completion in found], skip_special_tokens=True)
    assert texts == [answer["text"] for i in failed for answer in work[f"round-1-hint/{i}"]]
    rows = read_rows(tmp_path / "round-1.jsonl")
    rescued = [i for i in failed if any(row["prompt"] == f"{i}+{i}=" for row in rows)]
    assert rescued and lines[1]["hinted"] == len(rescued) / 16
    assert not any("hint" in row["prompt"] for row in rows)


def test_adapters_train_on_and_conversations_are_answered(files: Path, tmp_path: Path):
    talk = {"dataset": str(files / "talk.jsonl"), "lora_r": 2, "train_from": "last", "select": "top_k"}
    rejection(config_of(files, tmp_path, **talk, select_threshold=None))
    assert read_rows(tmp_path / "round-2.jsonl")[0]["completion"][0]["role"] == "assistant"
    assert (tmp_path / "adapter_config.json").is_file() and weights(tmp_path) == weights(tmp_path / "round-2")
    assert weights(tmp_path / "round-1") != weights(tmp_path / "round-2")


# ---- wherever it is stopped ----


def test_more_rounds_go_on_from_those_that_are_done(files: Path, straight: Path, tmp_path: Path):
    fields = {"eval_dataset": str(files / "held_out.jsonl")}
    rejection(config_of(files, tmp_path, rounds=1, **fields))
    assert weights(tmp_path) == weights(straight / "round-1")
    rejection(config_of(files, tmp_path, **fields))
    assert_the_same(tmp_path, straight)


@pytest.mark.parametrize("where", ["fastpost.stages.asking._groups", "fastpost.trainers.sft.backward"])
@pytest.mark.parametrize("after", [2, 6])
def test_stopped_amid_a_round(
    files: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, after: int
):
    """In the sampling or in the training of the first round, or of the second."""
    module, name = where.rsplit(".", 1)
    real, calls = getattr(sys.modules[module], name), []

    def stopped(*given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*given, **more)

    config = config_of(files, tmp_path, eval_dataset=str(files / "held_out.jsonl"))
    monkeypatch.setattr(where, stopped)
    with pytest.raises(KeyboardInterrupt):
        rejection(config)
    monkeypatch.setattr(where, real)
    rejection(config)
    assert_the_same(tmp_path, straight)


@pytest.mark.slow
def test_killed_it_ends_with_the_same_bits(files: Path):
    """Each kill is a bit later in the work than the one before."""

    def words(out: str) -> list[str]:
        fields = FIELDS | {"model": "model", "dataset": "prompts.jsonl", "eval_dataset": "held_out.jsonl"}
        return ["rejection", *flags_of(fields | {"reward": "rewards.py:digits", "output_dir": out})]

    def done(out: Path) -> int:
        return lines(out / "work.jsonl", *out.glob("round-*/metrics.jsonl"))

    ended(begun(words("whole"), files))
    draw, out, end = random.Random(0), files / "killed", done(files / "whole")
    for share in (0.1, 0.35, 0.6, 0.85):
        killed(begun(words("killed"), files), lambda n=share * end: done(out) >= n, draw)
    ended(begun(words("killed"), files))
    assert_the_same(out, files / "whole")


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"select_threshold": None}, "give that as well"),
        ({"select": "best", "select_threshold": None, "hint": "{prompt}!"}, "hint is for prompts where nothing"),
        ({"hint": "{answer}"}, r"must have \{prompt\} in it"),
        ({"resume_from_checkpoint": "runs/x"}, "goes on from what is in output_dir"),
        ({"metric_for_best_model": "reward", "eval_steps": 1}, "metric_for_best_model is of evaluations within a run"),
        ({"select": "worst"}, "select must be one of best, top_k, threshold"),
    ],
)
def test_what_does_not_go_together(files: Path, tmp_path: Path, changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        config_of(files, tmp_path, **changes)


def test_a_round_without_an_answer_and_a_hint_without_its_column(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fields = FIELDS | {"model": files / "model", "dataset": files / "prompts.jsonl", "output_dir": tmp_path / "out"}
    fields |= {"reward": f"{files}/rewards.py:digits", "select_threshold": 1000}
    words = flags_of(fields)
    assert main(["rejection", *words, "--hint", "{prompt}{solution}"]) == 2
    assert "rows without 'solution'" in capsys.readouterr().err
    assert main(["rejection", *words]) == 2
    assert "of 16 prompts with 4 answers each, none has one that ended and got at least 1000" in capsys.readouterr().err
    assert main(["rejection", *flags_of(fields | {"seed": 9})]) == 2
    assert "holds work that was done with seed 3, not 9" in capsys.readouterr().err
