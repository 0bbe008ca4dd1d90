"""The benchmark of whole steps: every contestant takes the same step, and one that takes another gets no speed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import end_to_end
import end_to_end_table
import step
import step_packed
import step_plain
import step_trl
import torch
from contest import RESULTS
from end_to_end import ENTRIES, Entry
from step import METHODS, Shape
from step_check import Rule, judged, write_gradients
from tables import rewritten

TINY = Shape(hidden=64, layers=2, vocab=96, rows=8, group=4, prompt=6, completion=8, longest=24, max_tokens=96, batch=4)
TINY = replace(TINY, dtype="float32")
PAIRS = [(method, entry) for method in METHODS for entry in ENTRIES if method in entry.methods]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Plain torch's gradients and float64's, and the parts of both losses: once a method and dtype."""
    found = {}

    def of(method, shape):
        if (method, shape) not in found:
            files = [tmp_path_factory.mktemp(method) / name for name in ("plain", "truth")]
            plain = step_plain.made(method, shape)
            truth = step_plain.made(method, replace(shape, dtype="float32"), dtype=torch.float64)
            losses = [write_gradients(str(f), t) for f, t in zip(files, (plain, truth), strict=True)]
            found[method, shape] = files, losses
        return found[method, shape]

    return of


def judge(trainee, entry, shape, known, file):
    (plain, truth), losses = known
    mine = write_gradients(str(file), trainee)
    return judged(Rule.of(entry.ours, shape.dtype), (file, plain, truth), (mine, *losses))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "entry"), PAIRS, ids=[f"{m}-{e.name}" for m, e in PAIRS])
def test_all_take_the_same_step(method, entry, dtype, known, tmp_path):
    shape = replace(TINY, dtype=dtype)
    trainee = entry.make(method, shape)
    errors, wrong = judge(trainee, entry, shape, known(method, shape), tmp_path / "its")
    assert not wrong
    assert errors["gradient"] > 0 or dtype == "float32"
    assert not trainee.gradients() and all(p.isfinite().all() for p in trainee.model.parameters())
    least = step.tokens(step.given(method, shape)) * (0.4 if "shared" in entry.name else 1)
    assert trainee.positions >= least


@pytest.mark.parametrize("method", METHODS)
def test_another_step_is_wrong(method, known, tmp_path):
    """One row's completion is another: of 8 rows 1, one token."""
    rows = step.given(method, TINY)
    rows[-1].completion[0] ^= 1
    trainee = step_packed.made(method, TINY)
    packs = partial(step_packed.packs, method, rows, TINY, False)
    other = replace(trainee, accumulate=partial(trainee.accumulate.func, *trainee.accumulate.args[:3], packs, TINY))
    _, wrong = judge(other, ENTRIES[0], TINY, known(method, TINY), tmp_path / "its")
    assert "gradient of" in wrong


def test_rows_are_those_of_the_seed_and_share_prompts():
    pairs, groups = step.given("dpo", TINY), step.given("grpo", TINY)
    assert all(
        a.prompt == b.prompt and a.completion != b.completion for a, b in zip(pairs[::2], pairs[1::2], strict=True)
    )
    assert len({tuple(row.prompt) for row in groups}) == TINY.rows // TINY.group
    assert groups == step.given("grpo", TINY) != step.given("grpo", replace(TINY, seed=1))
    with pytest.raises(ValueError, match="rows must be a multiple of 4 for grpo, got 6"):
        step.given("grpo", replace(TINY, rows=6))


def test_a_missing_gradient_is_wrong(known, tmp_path):
    from safetensors.torch import load_file, save_file

    (plain, truth), losses = known("sft", TINY)
    gradients = load_file(plain)
    gradients.pop("model.norm.weight")
    save_file(gradients, its := tmp_path / "its")
    _, wrong = judged(Rule(2.0, 1e-6), (its, plain, truth), (losses[0], *losses))
    assert "gradient of model.norm.weight off by nan" in wrong


class Here:
    """A contestant in this very process."""

    def __init__(self, make):
        self.make, self.made = make, None

    def told(self, order):
        self.made = self.made or self.make()
        return order(self.made)

    def dismissed(self):
        self.made = None


OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]


def run(output, *options):
    code = end_to_end.main([*OPTIONS, "--methods", "sft", "--repeats", "2", "--output", str(output), *options])
    return code, [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def other_seed(make, method, shape):
    return make(method, replace(shape, seed=1))


def test_the_program_writes_what_it_shows_and_the_readme_has_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(end_to_end, "Contestant", Here)
    output, readme = tmp_path / "lines.jsonl", tmp_path / "README.md"
    code, (ours, padded, packed) = run(output, "--contestants", "fastpost", "TRL, padded", "TRL, packed")
    assert code == 0 and [line["status"] for line in (ours, padded, packed)] == ["ok"] * 3
    assert ours["tokens"] == ours["positions"] == packed["positions"] < padded["positions"]
    assert len(ours["seconds"]) == 2 and ours["peak_bytes"] > 0 and ours["shape"]["dtype"] == "float32"
    shown = capsys.readouterr().out
    assert "tokens/s" in shown and "TRL, packed" in shown
    readme.write_text("before\n<!-- table:end_to_end -->\nold\n<!-- /table -->\n")
    assert end_to_end_table.main([str(output), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert "| tokens a second, peak memory | **fastpost** | TRL, padded | TRL, packed |" in text and "old" not in text
    (row,) = (line for line in text.splitlines() if line.startswith(f"| sft, {ours['tokens']} tokens, float32 | "))
    assert len(re.findall(r"\d+, \d+ MB", row)) == 3


def test_the_table_of_the_readme_is_that_of_the_committed_results(tmp_path):
    now, readme = end_to_end_table.README.read_text(), tmp_path / "README.md"
    readme.write_text(emptied := rewritten(now, "end_to_end", []))
    files = map(str, (RESULTS / "end_to_end").glob("*.jsonl"))
    assert end_to_end_table.main([*files, "--readme", str(readme)]) == 0
    assert emptied != readme.read_text() == now, "run `make readme`"


def test_a_wrong_step_has_no_speed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(end_to_end, "Contestant", Here)
    right, wrong = (Entry("fastpost", step_packed.made), Entry("TRL, padded", partial(other_seed, step_trl.made)))
    monkeypatch.setattr(end_to_end, "ENTRIES", (right, wrong))
    code, (ours, theirs) = run(tmp_path / "theirs.jsonl")
    assert code == 0 and ours["status"] == "ok" and theirs["status"] == "WRONG" and not theirs["seconds"]
    assert "WRONG: TRL, padded, sft: loss off by" in capsys.readouterr().out
    monkeypatch.setattr(end_to_end, "ENTRIES", (Entry("fastpost", partial(other_seed, step_packed.made)),))
    assert run(tmp_path / "ours.jsonl") == (1, [])
    assert "fastpost is wrong, so sft was not timed" in capsys.readouterr().err


@pytest.mark.slow  # four processes, each of which imports torch and transformers
def test_each_is_a_process(tmp_path):
    code, (ours, padded) = run(tmp_path / "lines.jsonl", "--contestants", "fastpost", "TRL, padded")
    assert code == 0 and ours["status"] == padded["status"] == "ok" and ours["tokens"] < padded["positions"]
