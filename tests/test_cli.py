"""The command line: values from flags and YAML, errors in one line that names them, help that reads well."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from fastpost.cli import VERBS, main, read_config, read_flags
from fastpost.trainers.config import Demo, Grpo, Sft

REQUIRED = ["--model", "m", "--dataset", "d.jsonl", "--output_dir", "out"]
GRPO = [*REQUIRED, "--reward", "number_match"]


def error_of(capsys: pytest.CaptureFixture, *words: str) -> str:
    """The one line that a bad command line gets."""
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_yaml_and_flags_make_one_config_and_a_flag_wins(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndataset: d.jsonl\noutput_dir: out\nlearning_rate: 1e-5\nmax_steps: 7\nbf16: false\n")
    config = read_config(Sft, ["--config", str(file), "--max_steps", "9"])
    assert (config.learning_rate, config.max_steps, config.bf16) == (1e-5, 9, False)  # 1e-5 is a string in YAML 1.1


def test_flags_spell_bools_lists_and_nothing():
    flags = ["--no-load_in_4bit", "--trust-remote-code", "--reward", "a", "b", "--reward=c", "--max_steps", "-1"]
    assert read_flags(Grpo, flags) == {
        "load_in_4bit": "false",
        "trust_remote_code": "true",
        "reward": ["a", "b", "c"],
        "max_steps": "-1",
    }
    config = read_config(Grpo, [*GRPO, "--reward_weights", "0.5", "--epsilon_high", "none"])
    assert config.reward == ("number_match",) and config.reward_weights == (0.5,) and config.epsilon_high is None
    assert read_config(Demo, ["--no-control"]).control is False


def test_a_list_in_yaml_may_be_a_single_value(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndataset: d\noutput_dir: out\nreward: [a, 'b.py:f']\nlora_target_modules: q_proj\n")
    config = read_config(Grpo, ["--config", str(file)])
    assert config.reward == ("a", "b.py:f") and config.lora_target_modules == ("q_proj",)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpro"], "unknown verb 'gpro' (did you mean 'grpo'?)"),
        (["--model", "m"], "the verb comes first, got '--model'"),
        (["sft", *REQUIRED, "--learningrate", "1"], "unknown flag --learningrate (did you mean 'learning_rate'?)"),
        (["sft", *REQUIRED, "--reward", "x"], "unknown flag --reward"),
        (["sft", "--model", "m"], "dataset, output_dir must be given"),
        (["sft", *REQUIRED, "--seed"], "--seed needs a value"),
        (["sft", *REQUIRED, "--seed", "1", "2"], "--seed takes one value, got 1 and 2"),
        (["sft", *REQUIRED, "stray"], "takes one value, got out and stray"),
        (["sft", "stray"], "expected a flag, got 'stray'"),
        (["sft", *REQUIRED, "--learning_rate", "abc"], "learning_rate must be a number, got 'abc'"),
        (["sft", *REQUIRED, "--learning_rate", "nan"], "learning_rate must be finite, got nan"),
        (["sft", *REQUIRED, "--max_steps", "1.5"], "max_steps must be a whole number, got '1.5'"),
        (["sft", *REQUIRED, "--max_steps", "0"], "max_steps must be positive, or -1"),
        (["sft", *REQUIRED, "--bf16", "maybe"], "bf16 must be true or false or none, got 'maybe'"),
        (["sft", *REQUIRED, "--lr_scheduler_type", "cosin"], "got 'cosin' (did you mean 'cosine'?)"),
        (["sft", *REQUIRED, "--load_in_4bit"], "load_in_4bit freezes the base model"),
        (["grpo", *GRPO, "--num_generations", "1"], "num_generations must be at least 2, got 1"),
        (
            ["grpo", *GRPO, "--num_generations", "3"],
            "multiple of num_generations 3: make it 6 or 9; or num_generations 2, 4, 8",
        ),
        (["grpo", *GRPO, "--reward_weights", "1", "2"], "one number for each of the 1 rewards, got 2"),
        (
            ["grpo", *GRPO, "--num_iterations", "4", "--max_steps", "10"],
            "max_steps must be a multiple of num_iterations 4",
        ),
        (["sft", "--config", "nowhere.yaml"], "cannot read the config nowhere.yaml"),
    ],
)
def test_bad_words_are_named_in_one_line(capsys: pytest.CaptureFixture, words: list[str], said: str):
    assert said in error_of(capsys, *words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle: m\n", "unknown key 'modle' in {file} (did you mean 'model'?)"),
        ("- a\n- b\n", "{file} must hold `field: value` lines, got a list"),
        ("a: [1\n", "{file} is not YAML"),
        ("!!python/object/apply:os.system ['true']\n", "{file} is not YAML"),
        ("config: other.yaml\n", "unknown key 'config'"),
        ("model: 5\n", "model must be text, got 5"),
        ("model: a\nseed: 1\nmodel: b\n", "{file}, line 3: the key 'model' is there a second time"),
        ("max_steps: true\n", "max_steps must be a whole number, got True"),
    ],
)
def test_bad_yaml_is_named(capsys: pytest.CaptureFixture, tmp_path: Path, text: str, said: str):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    flags = ["--dataset", "d", "--output_dir", "o", *([] if "model" in text else ["--model", "m"])]
    assert said.format(file=file) in error_of(capsys, "sft", "--config", str(file), *flags)


def test_missing_files_stop_a_run_before_anything_is_written(capsys: pytest.CaptureFixture, tmp_path: Path):
    out = tmp_path / "out"
    words = ["--model", str(tmp_path / "none"), "--dataset", str(tmp_path / "none.jsonl"), "--output_dir", str(out)]
    assert "none.jsonl' does not exist" in error_of(capsys, "sft", *words)
    (tmp_path / "none.jsonl").write_text('{"text": "a"}\n')
    assert "none' is no directory" in error_of(capsys, "sft", *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none.jsonl"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_field_with_its_default(capsys: pytest.CaptureFixture, verb: str):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(VERBS[verb][0]):
        assert f"--{field.name} " in text
        assert field.metadata["help"].split()[0] in text
    assert max(map(len, text.splitlines())) <= 120


def test_help_loads_no_heavy_library():
    code = "import sys; from fastpost.cli import main; main(['grpo', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "torch" in loaded
    assert not loaded & {"transformers", "peft", "datasets", "matplotlib", "rich", "yaml"}


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    """Only our own words become one line: a ValueError from inside another library is not about the input."""
    monkeypatch.setattr("fastpost.demo.demo", lambda config: int("not a number"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["demo"])
