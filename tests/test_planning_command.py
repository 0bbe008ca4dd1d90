"""`fastpost plan`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import planned as benchmark

import tiny
from fastpost.cli import main
from fastpost.planning.report import table
from planned_runs import written


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Not here: see test_planning.py."""
    torch.utils._device._device_constructors.cache_clear()


@pytest.fixture
def memory_table(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What writes the tables of the page."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "docs"))
    import memory_table

    return memory_table


def planned(capsys: pytest.CaptureFixture, *words: str) -> Any:
    assert main(["plan", *words, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def test_a_table_and_the_same_as_json(directory: Path, capsys: pytest.CaptureFixture):
    found = planned(capsys, "sft", "--model", str(directory / "config.json"), "--max_length", "32", "--lora_r", "4")
    assert found["method"] == "LoRA" and list(found["methods"]) == ["full", "LoRA", "QLoRA"] and not found["refused"]
    for method in found["methods"].values():
        assert method["peak_bytes"] == sum(method["peak_parts"].values()) and all(method["fits"].values())
        assert all(method["parts"][name] >= size for name, size in method["peak_parts"].items())
        assert method["peak_bytes"] == max(moment["bytes"] for moment in method["moments"])
        assert set(method["largest_microbatch_rows"]) == {"24", "40", "80", "141", "180"}
        assert set(method["largest_context_tokens"].values()) == {tiny.SHAPE["max_position_embeddings"]}
    text = table(found)
    assert "LoRA *" in text and "in 24 GB" in text and "x 32; 128" in text and "does not fit" not in text
    assert "GB of each part, at its most" in text and "which is in" in text


def test_what_does_not_fit_is_told_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = written(tmp_path, vocab_size=250_000, hidden_size=4096)
    assert main(["plan", "sft", "--model", str(path), "--gpu", "24", "--max_length", "128"]) == 0
    text = capsys.readouterr().out
    assert "this run does not fit" in text and "--lora_r 16" in text and "--optim adamw_8bit" in text
    assert "nothing" in text


def test_an_engine_s_cache_is_told_and_not_counted(directory: Path, capsys: pytest.CaptureFixture):
    words = ["grpo", "--model", str(directory), "--max_prompt_length", "8", "--max_completion_length", "24"]
    found = planned(capsys, *words, "--rollout_engine", "--gpu", "24")
    (cache, *_) = {method["engine_cache_bytes"] for method in found["methods"].values()}
    assert cache > 0 and "an engine's own KV cache is not counted" in table(found)
    assert all("KV cache" not in method["parts"] for method in found["methods"].values())


def test_a_checkpoint_in_four_bits_is_planned_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = written(tmp_path)
    words = ["sft", "--model", str(path), "--max_length", "32", "--lora_r", "4", "--gpu", "24"]
    whole = planned(capsys, *words, "--no-use_bnb_nested_quant")["methods"]["QLoRA"]
    quantised(path, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    found = planned(capsys, *words)
    assert found["methods"] == {"QLoRA": whole} and found["method"] == "QLoRA"
    assert main(["plan", *words[:-4]]) == 2
    assert "is quantised, so its weights cannot train: give lora_r" in capsys.readouterr().err
    quantised(path, {"quant_method": "gptq", "bits": 4})
    assert main(["plan", *words]) == 2
    assert "is quantised (gptq), and a plan knows bitsandbytes' 4 bits alone" in capsys.readouterr().err


def quantised(path: Path, how: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": how}))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sft", "--model", "{d}/none.json"], "is neither a directory nor a config.json"),
        (["sft", "--model", "no-such-model"], "is neither a directory nor a config.json"),
        (["sft", "--model", "./models/none"], "is neither a directory nor a config.json"),
        (["sft", "--model", "testz/tiny.py"], "has no config that transformers reads"),
        (["sft", "--model", "{d}", "--gpu", "0"], "gpu must be above 0, got 0"),
        (["stf", "--model", "{d}"], "unknown verb 'plan stf' (did you mean 'plan sft'?)"),
        (["ppo", "--model", "{d}", "--roles", "two"], "roles must be one of one base, separate, got 'two'"),
        (["sft", "--model", "{d}", "--max_length", "129"], "do not fit into the 128 positions of LlamaForCausalLM"),
        (["grpo", "--model", "{d}"], "sequences of 1024 tokens (max_length, or max_prompt_length and"),
        (["sft", "--model", "{d}", "--attn_implementation", "eager"], "attn_implementation 'eager' holds a number"),
    ],
)
def test_bad_words_are_named(
    words: list[str], said: str, directory: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["plan", *(word.format(d=directory) for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_a_path_that_is_nearly_right_is_told(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any):
    """At once, and not by the hub."""
    (tmp_path / "models").mkdir()
    written(tmp_path / "models" / "policy")
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "sft", "--model", "models/polcy", "--max_length", "32"]) == 2
    assert "'models/polcy' is neither a directory nor a config.json (did you mean 'policy'?)" in capsys.readouterr().err


def test_a_method_that_cannot_be_planned_leaves_the_others(
    directory: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    import fastpost.planning.command as command

    def but_four_bits(config: Any) -> Any:
        if config.load_in_4bit:
            raise ValueError("no such kernel")
        return surveyed(config)

    surveyed = command.surveyed
    monkeypatch.setattr(command, "surveyed", but_four_bits)
    found = planned(capsys, "sft", "--model", str(directory), "--max_length", "32", "--gpu", "24")
    assert list(found["methods"]) == ["full", "LoRA"] and found["refused"] == {"QLoRA": "no such kernel"}
    assert "QLoRA: not planned: no such kernel" in table(found)


def test_experts_are_planned_by_every_method(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = written(tmp_path, "mixtral", num_local_experts=4)
    found = planned(capsys, "sft", "--model", str(path), "--max_length", "32", "--gpu", "24")
    assert list(found["methods"]) == ["full", "LoRA", "QLoRA"]


def test_the_first_word_alone_lists_the_plans(capsys: pytest.CaptureFixture):
    for words in (["plan"], ["plan", "--help"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert "plan sft" in text and "plan ppo" in text and "merge" not in text


@pytest.mark.parametrize("words", [["plan", "sft", "--help"], ["doctor", "rows.jsonl"], ["doctor", "bad.jsonl"]])
def test_whoever_reads_may_go(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As `head` does, before the verb is through or after; of the files one is sound, and one is not."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path("bad.jsonl").write_text('{"question": "a"}\n')
    program = f"import sys; from fastpost.cli import main; sys.exit(main({words}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("PYTHONUNBUFFERED", None)
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, env=environment)
    os.close(writing)
    assert done.returncode == 141 and b"Broken" not in done.stderr and b"Traceback" not in done.stderr


def test_the_page_has_the_committed_measurements(memory_table: Any):
    """And none of them is too far from its plan."""
    lines = [json.loads(line) for line in memory_table.RESULTS.read_text().splitlines()]
    assert f"<!-- table:planned -->\n{memory_table.measured()}\n<!-- /table -->" in memory_table.PAGE.read_text()
    assert [line["run"] for line in lines] == list(benchmark.RUNS)
    for line in lines:
        assert line["measured"]["peak"] >= 500e6
        assert abs(line["error"]["peak"]) <= benchmark.TOTAL
        assert abs(line["error"]["largest part"]) <= benchmark.LARGEST


def test_the_long_runs_that_train_whole_are_at_their_peak_in_training(memory_table: Any):
    """Where activations count, and not in the step of the optimizer, which is a formula."""
    lines = [json.loads(line) for line in memory_table.RESULTS.read_text().splitlines()]
    assert [line["plan"]["moment"] for line in lines if "full" in line["run"] and "long" in line["run"]] == [
        "training"
    ] * 3


def test_the_page_has_the_gpus_of_the_plans(tmp_path: Path, memory_table: Any):
    what, kind, fields = memory_table.RUNS[-1]
    row = memory_table.row("8B", what, kind, fields, memory_table.write_config("8B", tmp_path))
    assert row in memory_table.PAGE.read_text()
