"""docs/tools.md: its simulated user is talked to, and the policy learns what that takes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from statistics import fmean

import pytest

pytest.importorskip("transformers")

import talking
from fastpost.cli import main
from fastpost.sums import write_random
from fastpost.trainers.log import read_lines

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "tools.md").read_text()
EXAMPLE = PAGE.partition("hard of hearing")[2]
NAMES = ("mia", "tom", "ana", "ben", "eva", "leo", "zoe", "max")


def greeted(name: str, first: str, second: str) -> dict[str, list]:
    """A demonstration, in which the user asks again."""
    prompt = [{"role": "user", "content": f"greet {name}"}]
    said = {"role": "assistant", "content": first}, {"role": "user", "content": "What?"}
    return {"prompt": prompt, "completion": [*said, {"role": "assistant", "content": second}]}


def test_a_policy_learns_to_speak_to_the_user_of_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    both = [(f"hello {name}", f"HELLO {name.upper()}") for name in NAMES]
    rows = [greeted(name, *said) for name, (a, b) in zip(NAMES, both, strict=True) for said in ((a, b), (b, a))]
    files = {"hello": rows, "prompts": [{"prompt": row["prompt"]} for row in rows[::2]]}
    for name, of in files.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    tokenizer = talking.tokenizer([text for said in both for text in said])
    tokenizer.chat_template = talking.MARKED
    write_random(Path("model"), tokenizer, seed=0)
    Path("user.py").write_text(EXAMPLE.split("```python\n")[1].split("```")[0])
    sft = "sft --model model --dataset hello.jsonl --output_dir runs/hello --assistant_only_loss --max_steps 90"
    assert main([*sft.split(), "--learning_rate", "3e-3", "--per_device_train_batch_size", "16"]) == 0
    command = EXAMPLE.split("```\nfastpost ")[1].split("```")[0].replace("\\\n", " ")
    assert main(shlex.split(command)) == 0
    lines = [line for line in read_lines(Path("runs/loud/metrics.jsonl")) if "reward" in line]
    early, late = (
        {name: fmean(x[name] for x in of) for name in ("reward", "turns/mean")} for of in (lines[:3], lines[-3:])
    )
    assert early["reward"] < 0.8 < 0.9 < late["reward"]
    assert late["turns/mean"] < early["turns/mean"] - 0.2 and late["turns/mean"] < 1.2
