"""What a run says of its data before it trains: the doctor's lines, the overlap with held-out rows; run.json has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import tiny
from fastpost import cli
from fastpost.trainers.config import Distill, Dpo, Grpo, Kto, Reward, Sft
from fastpost.trainers.distill import distill
from fastpost.trainers.dpo import dpo
from fastpost.trainers.grpo import grpo
from fastpost.trainers.kto import kto
from fastpost.trainers.reward import reward
from fastpost.trainers.sft import sft

SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(5) for b in range(2)]
ROWS = {
    "sums": [{"prompt": asked, "completion": said} for asked, said in SUMS],
    "long": [{"prompt": asked, "completion": 20 * said} for asked, said in SUMS],
    "talk": [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in SUMS
    ],
    "pairs": [{"prompt": asked, "chosen": said, "rejected": "?"} for asked, said in [*SUMS, SUMS[0]]],
    "liked": [{"prompt": asked, "completion": said, "label": True} for asked, said in SUMS],
    "prompts": [{"prompt": asked} for asked in ["1+1=", "2+2=", "3+3=", "1+1=", "a much longer one"]],
}
BRIEF = {"max_steps": 1, "per_device_train_batch_size": 4, "save_steps": 0, "gradient_checkpointing": False}
GROUPS = {"num_generations": 2, "max_completion_length": 3, "max_prompt_length": 8}
# A verb on a file -> what run.json has of "train", its problems aside.
RUNS = {
    "sft": (sft, Sft, "sums", {}, {"rows": 10, "examples": 10, "unit": "examples"}),
    "dpo": (dpo, Dpo, "pairs", {}, {"rows": 11, "examples": 11, "duplicates": 1, "unit": "pairs"}),
    "reward": (reward, Reward, "pairs", {}, {"rows": 11, "duplicates": 1, "unit": "pairs"}),
    "kto": (kto, Kto, "pairs", {}, {"rows": 11, "examples": 22, "duplicates": 2, "unit": "examples"}),
    "distill": (distill, Distill, "sums", {"teacher_model": "teacher", "lmbda": 0.0}, {"rows": 10, "unit": "examples"}),
    "grpo": (grpo, Grpo, "prompts", GROUPS, {"rows": 5, "examples": 4, "too_long": 1, "duplicates": 1}),
}  # fmt: skip


def ones(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory, and the files."""
    directory = tmp_path_factory.mktemp("files")
    tiny.model("qwen3").save_pretrained(directory / "model")
    tiny.model("qwen3", seed=1).save_pretrained(directory / "teacher")
    for name in ("model", "teacher"):
        tiny.tokenizer().save_pretrained(directory / name)
    for name, rows in ROWS.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def data_of(verb: Any, config: type, files: Path, rows: str, out: Path, **changes: Any) -> dict[str, Any]:
    """What run.json has of the data after one step."""
    fields = {"model": files / "model", "dataset": files / f"{rows}.jsonl", "output_dir": out} | BRIEF | changes
    if "teacher_model" in fields:
        fields["teacher_model"] = files / fields["teacher_model"]
    verb(config(**fields), **({"reward_funcs": ones} if config is Grpo else {}))
    return json.loads((out / "run.json").read_text())["data"]


@pytest.mark.parametrize("verb", RUNS)
def test_run_json_has_what_became_of_the_rows(verb: str, files: Path, tmp_path: Path):
    function, config, rows, changes, wanted = RUNS[verb]
    found = data_of(function, config, files, rows, tmp_path / "out", **changes)
    assert found["train"].items() >= wanted.items()
    assert found.keys() == {"train"}
    assert not {"unsound", "odd"} & found["train"].keys()


def test_what_is_unsound_is_said_in_the_words_of_the_doctor(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Every answer is cut before its end. The run goes on; the doctor's exit code is 1."""
    found = data_of(sft, Sft, files, "long", tmp_path / "out", max_length=12)["train"]
    said = capsys.readouterr().err
    (line,) = found["unsound"]
    assert line == "nothing teaches the model to stop: none of the 10 examples has an EOS to predict"
    assert f"UNSOUND: train: {line}\n" in said
    asked = [
        "doctor",
        str(files / "long.jsonl"),
        "--model",
        str(files / "model"),
        "--verb",
        "sft",
        "--max_length",
        "12",
    ]
    with pytest.raises(SystemExit) as left:
        cli.main([*asked, "--json"])
    assert left.value.code == 1
    assert json.loads(capsys.readouterr().out)["readings"][0]["unsound"] == [line]


def test_the_chat_template_is_looked_at(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    model = tiny.model("qwen3")
    fields = {"model": "", "dataset": files / "talk.jsonl", "output_dir": tmp_path / "out"} | BRIEF
    sft(Sft(**fields), model=model, processing_class=tokenizer)
    said = capsys.readouterr().err
    assert "UNSOUND: train: the chat template never writes the EOS, '<eos>', after the assistant's words\n" in said


def test_held_out_rows_that_are_trained_on_are_counted(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    held_out = [ROWS["sums"][3], {"prompt": SUMS[4][0], "completion": "x"}, {"prompt": "9+9=", "completion": "18"}]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    found = data_of(sft, Sft, files, "sums", tmp_path / "out", eval_dataset=tmp_path / "eval.jsonl")
    rows = "1 of 3 held-out rows are in the training data (row 0 here, row 3 there)"
    prompts = "2 of 3 held-out prompts are in the training data"
    assert found["eval"]["odd"] == [rows, prompts]
    assert f"warning: eval: {rows}\nwarning: eval: {prompts}\n" in capsys.readouterr().err


def test_labels_of_one_kind_are_unsound(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data_of(kto, Kto, files, "liked", tmp_path / "out")
    assert (
        "UNSOUND: train: every completion is desirable: there is nothing to tell it from\n" in capsys.readouterr().err
    )


def test_a_row_that_cannot_be_read_is_named_with_the_data_it_is_of(files: Path, tmp_path: Path):
    rows = [*ROWS["talk"], {"messages": [{"role": "assistant", "content": "42"}]}]
    fields = {"model": files / "model", "dataset": files / "talk.jsonl", "output_dir": tmp_path / "out"} | BRIEF
    with pytest.raises(ValueError, match="eval, row 10, column 'messages' must end with what the assistant answers"):
        distill(Distill(**fields, teacher_model=files / "teacher", lmbda=0.0), eval_dataset=rows)
