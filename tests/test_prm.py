"""Process reward models: how steps are laid out, the gradient against float64, what a run leaves, and rewards."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import AutoModelForTokenClassification

import preference_runs as runs
import talking
import tiny
from fastpost import metrics
from fastpost.cli import main
from fastpost.data import Stepped, check_columns, step_examples
from fastpost.data.steps import steps_of
from fastpost.models.scalar import load_scored
from fastpost.rewards import load_reward
from fastpost.rewards.model import RewardModel
from fastpost.rewards.steps import StepRewards
from fastpost.trainers.config import Prm
from fastpost.trainers.examples import read_examples
from fastpost.trainers.prm import backward, prm
from rules import assert_close_to_truth, assert_gradient_close_to_truth

STEPS = [
    {"prompt": f"{a}+{b}=", "completions": [f"{a}", "and", f"{a + b + wrong}"], "labels": [True, True, not wrong]}
    for a in range(6)
    for b in range(3)
    for wrong in (0, 1)
]


def config_of(files: Path | str = "f", out: Path | str = "o", **changes) -> Prm:
    return Prm(**runs.fields(Path(files), Path(out), **({"step_separator": ";"} | changes)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a causal LM, and a model that scores."""
    found = runs.write_files(tmp_path_factory.mktemp("files"), STEPS)
    model = load_scored(found / "model", "it", fresh=True)
    torch.manual_seed(2)
    model.score.weight.data.normal_(0, 0.2)
    model.config.pad_token_id = 0
    model.save_pretrained(found / "scored")
    tiny.tokenizer().save_pretrained(found / "scored")
    return found


# ---- rows ----


def read(rows: list[dict], max_length: int | None = None, **more: Any) -> tuple[list[Stepped], Any]:
    return step_examples(rows, tiny.tokenizer(), max_length, ";", **more)


def test_a_label_lies_on_the_last_token_of_the_separator_behind_its_step():
    row = {"prompt": "1+2=", "completions": ["one", "", "3"], "labels": [True, False, 0.25]}
    ((one,), counts) = read([row])
    assert tiny.tokenizer().decode(one.input_ids) == "1+2=one;;3;"
    assert (one.ends, one.labels) == ([7, 8, 10], [1.0, 0.0, 0.25])
    assert (counts.predicted, counts.empty, counts.unit) == (3, 1, "solutions")
    assert read([row], last_only=True)[0] == [Stepped(one.input_ids, [10], [0.25])]
    (cut,), counts = read([row, {**row, "prompt": "1+2+3+4+5"}], max_length=9)
    assert cut == Stepped(one.input_ids[:9], [7, 8], [1.0, 0.0])
    assert (counts.truncated, counts.masked) == (1, 1)
    ((two,), _) = step_examples([row], tiny.tokenizer(), None, "and ")
    assert tiny.tokenizer().decode(two.input_ids[two.ends[0] - 3 : two.ends[0] + 1]) == "and "


def test_a_conversation_is_answered_step_by_step():
    row = {"prompt": [{"role": "user", "content": "1+2"}], "completions": ["3"], "labels": [True]}
    ((one,), _) = read([row])
    assert tiny.tokenizer().decode(one.input_ids) == "<|user|>1+2<|assistant|>3;"


def test_text_falls_into_steps_where_it_is_separated():
    assert steps_of("a;b;", ";") == steps_of(" a;;b"[1:], ";") == ["a", "b"]
    assert steps_of("", ";") == [""] and steps_of(";", ";") == [";"]


def test_steps_are_no_conversation_that_wants_a_template(capsys: pytest.CaptureFixture):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    read_examples({"train": STEPS}, "prm", tokenizer, lambda name, rows: step_examples(rows, tokenizer, None, ";"))
    assert "UNSOUND" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": [True]}, r"row 0, column 'labels' must be a list, one for each of 2 steps, got \[True\]"),
        ({"labels": [True, 2]}, r"column 'labels'\[1\] must be true, false or a probability, got 2"),
        ({"labels": [True, None]}, r"'labels'\[1\] must be true, false or a probability, got nothing"),
        ({"completions": []}, "column 'completions' must be a list, the steps, one text or more"),
        ({"completions": ["a", 3]}, r"column 'completions'\[1\] must be text, got 3"),
        ({"completions": "a"}, "column 'completions' must be a list"),
    ],
)
def test_rows_that_are_no_solutions_are_named(change: dict, said: str):
    row = {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}
    check_columns([row], "prm", "d.jsonl")
    with pytest.raises(ValueError, match=said):
        check_columns([row | change], "prm", "d.jsonl")


# ---- a step ----


def window() -> list[Stepped]:
    draw = torch.Generator().manual_seed(1)
    ids = lambda n: torch.randint(5, 97, (n,), generator=draw).tolist()  # noqa: E731
    return [Stepped(ids(9), [4, 8], [1.0, 0.0]), Stepped(ids(5), [3], [0.3]), Stepped(ids(12), [2, 6, 11], [1, 1, 0.9])]


def plain(model: Any, solutions: list[Stepped]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and the scores by Hugging Face's own trunk, one solution at a time."""
    said = [model.score(model.model(torch.tensor([s.input_ids])).last_hidden_state[0, s.ends])[:, 0] for s in solutions]
    labels = torch.tensor([label for one in solutions for label in one.labels]).to(said[0])
    loss = F.binary_cross_entropy_with_logits(torch.cat(said), labels)
    return loss.detach(), runs.gradient(loss, model), torch.cat(said).detach()


@pytest.mark.parametrize("rows", runs.ROWS)
def test_a_window_has_the_gradient_of_the_mean_over_all_its_steps(files: Path, rows: dict):
    model = load_scored(files / "scored", "it", fresh=False)
    ours: nn.Module = copy.deepcopy(model).train()
    values = backward(ours, window(), config_of(**rows))
    (loss32, grad32, said32), (loss64, grad64, _) = (
        plain(copy.deepcopy(model).to(dtype), window()) for dtype in (torch.float32, torch.float64)
    )
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in ours.parameters()]
    assert_gradient_close_to_truth(torch.cat([g.flatten() for g in gradients]), grad32, grad64)
    assert_close_to_truth(torch.tensor(values["loss"]), loss32, loss64)
    agree = (said32 > 0) == torch.tensor([True, False, False, True, True, True])
    assert values["accuracy"] == pytest.approx(float(agree.float().mean()))


def test_steps_that_are_wrong_have_an_accuracy_of_their_own():
    found = metrics.floats(metrics.steps(torch.tensor([3.0, 2.0, 1.0, -1.0]), torch.tensor([1.0, 0.8, 0.0, 0.2])))
    assert (found["accuracy"], found["accuracy/right"], found["accuracy/wrong"]) == (0.75, 1.0, 0.5)
    assert found["probability"] == pytest.approx(sum(1 / (1 + math.exp(-x)) for x in (3, 2, 1, -1)) / 4)


# ---- whole runs ----


def test_a_run_learns_which_steps_are_right(files: Path, tmp_path: Path):
    held_out = {"eval_dataset": files / "rows.jsonl", "eval_steps": 20}
    prm(config_of(files, tmp_path, max_steps=60, per_device_train_batch_size=12, save_steps=0, **held_out))
    first, *_, last = runs.lines(tmp_path)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4), "a new head says 0 of everything"
    assert last["eval_loss"] < 0.5 * first["loss"] and last["eval_accuracy"] > 0.85


KINDS = {
    "full": {},
    "full, with a head": {"model": "scored", "train_on_last_step_only": True},
    "lora with dropout": {"lora_r": 4, "lora_dropout": 0.3},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_k_steps_and_a_resume_give_the_bits_of_the_straight_run(files: Path, tmp_path: Path, changes: dict):
    changes = {name: str(files / x) if name == "model" else x for name, x in changes.items()}
    config = partial(config_of, files, **changes)
    prm(config(out=tmp_path / "straight"))
    prm(config(out=tmp_path / "resumed", resume_from_checkpoint=tmp_path / "straight" / "checkpoint-3"))
    assert runs.weights(tmp_path / "resumed") == runs.weights(tmp_path / "straight")
    assert runs.lines(tmp_path / "resumed") == runs.lines(tmp_path / "straight")[3:]
    for directory in (tmp_path / "straight", tmp_path / "straight" / "checkpoint-3"):
        assert json.loads((directory / "prm.json").read_text()) == {"step_separator": ";"}


def test_separators_may_be_written_with_a_backslash(capsys: pytest.CaptureFixture):
    assert config_of(step_separator="\\n\\n").step_separator == "\n\n" and Prm(output_dir="o").step_separator == "\n"
    with pytest.raises(ValueError, match="step_separator must be a text"):
        config_of(step_separator="")
    assert main(["prm", "--model", "m", "--dataset", "d", "--output_dir", "o", "--step_separator", ""]) == 2
    assert "step_separator" in capsys.readouterr().err


# ---- as a reward ----

PROMPTS, COMPLETIONS = ["1+1=", "2+2=", "3+4="], ["1;and;2", "4;", "no separator"]
LAID = ["1+1=1;and;2;", "2+2=4;", "3+4=no separator;"]


def as_token_classifier(directory: Path, dtype: torch.dtype) -> list[Tensor]:
    """What transformers makes of the files, as of a model with a label for each token."""
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(directory, dtype=dtype), tiny.tokenizer()
    assert model.config.num_labels == 1
    found = []
    for text in LAID:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0, :, 0]
        found.append(logits[ids[0] == tokenizer.convert_tokens_to_ids(";")].sigmoid())
    return found


def test_step_scores_are_those_of_what_loads_elsewhere_and_become_one_number(files: Path, tmp_path: Path):
    out = tmp_path / "prm"
    prm(config_of(files, out, model=files / "scored", max_steps=3))
    reward = load_reward(str(out)).function
    assert isinstance(reward, StepRewards)
    each = reward.of_steps(PROMPTS, COMPLETIONS)
    assert [len(one) for one in each] == [3, 1, 1]
    same, truth = (torch.cat(as_token_classifier(out, dtype)) for dtype in (torch.float32, torch.float64))
    assert_close_to_truth(torch.tensor([p for one in each for p in one]), same, truth)
    for way, number in {"min": min, "product": math.prod, "last": lambda one: one[-1]}.items():
        loaded = load_reward(f"{out}:{way}")
        assert loaded.name == f"prm_{way}"
        assert loaded.function(prompts=PROMPTS, completions=COMPLETIONS) == [number(one) for one in each]
    said = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    asked = [[{"role": "user", "content": text}] for text in PROMPTS]
    assert len(reward(asked, said)) == 3
    with pytest.raises(ValueError, match=r"steps become a reward by min, product, last, dense, got 'lats'.*'last'"):
        load_reward(f"{out}:lats")
    with pytest.raises(ValueError, match=r"does not score steps: it has no prm\.json"):
        load_reward(f"{files / 'scored'}:min")


@pytest.mark.parametrize("kind", [RewardModel, partial(StepRewards, separator=";")])
def test_what_the_template_reads_of_a_row_is_read_when_it_is_judged(kind: Any, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    tokenizer = talking.tokenizer()

    def scored(_: Any, rows: list[list[int]], ends: Any) -> list[Tensor]:
        seen.extend(tokenizer.decode(row) for row in rows)
        return [torch.zeros(len(each)) for each in ends]

    for room in ("model", "steps"):
        monkeypatch.setattr(f"fastpost.rewards.{room}.scores_where_there_is_room", scored)
    asked = [[{"role": "user", "content": "1"}]] * 2
    said = [[{"role": "assistant", "content": "2"}]] * 2
    tools = [[{"type": "function", "function": {"name": name}}] for name in ("calculator", "12")]
    kind(None, tokenizer)(asked, said, tools=tools)
    assert [text.partition("<eos>")[0] for text in seen] == ["<|system|>calculator ", "<|system|>12 "]


def test_an_adapter_scores_steps_as_well(files: Path, tmp_path: Path):
    prm(config_of(files, tmp_path, lora_r=2, max_steps=3))
    assert load_reward(str(tmp_path)).function(PROMPTS, COMPLETIONS) != [0.5] * 3
