"""`fastpost eval`: its numbers are those of the answers it keeps, and what is done is not done again."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

import tiny
from fastpost.cli import main, read_config
from fastpost.evaluation.command import evaluate
from fastpost.evaluation.comparison import difference
from fastpost.evaluation.config import Eval
from fastpost.evaluation.divergence import measured
from fastpost.evaluation.duels import won
from fastpost.evaluation.extraction import extraction
from fastpost.evaluation.intervals import Confidence
from fastpost.evaluation.pairs import format_kind, length_kind
from fastpost.judging import Panel, Preference
from fastpost.rewards import Reward
from fastpost.stages.groups import Answer, Group
from rules import assert_close_to_truth

ROOT = Path(__file__).resolve().parents[1]
N = 4
HOW = Confidence(0.95, 200, 0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("a", "b", "c")):
        tiny.model("qwen3", seed=seed).save_pretrained(directory / name)
        tiny.tokenizer().save_pretrained(directory / name)
    rows = {
        "sums": [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(6)],
        "pairs": [
            {"prompt": "a", "chosen": "x" * better, "rejected": "y" * worse}
            for better, worse in ((30, 10), (30, 10), (10, 30), (20, 20))
        ],
    }
    for name, each in rows.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    (directory / "mine.py").write_text(
        "def digits(completions, **_):\n    return [float(any('0' <= x <= '9' for x in c)) for c in completions]\n"
        "def long(completions, **_):\n    return [float(len(c)) for c in completions]\n"
        "def first(text):\n    return text[:1] or None\n"
        "def refuses(completions, **_):\n    return [float('a' in c) for c in completions]\n"
    )
    return directory


def config_of(files: Path, out: Path, *models: str, **changes: Any) -> Eval:
    fields: dict[str, Any] = {"max_completion_length": 6, "num_generations": N, "bootstrap_resamples": 200}
    fields |= {"model": [str(files / name) for name in models], "output_dir": out, "generation_batch_size": 2 * N}
    fields |= {"dataset": files / "sums.jsonl", "reward": f"{files}/mine.py:digits", "seed": 1}
    return Eval(**(fields | changes))


def kept(out: Path, model: str) -> dict[str, Any]:
    lines = (out / "models" / model / "work.jsonl").read_text().splitlines()
    return dict(json.loads(line) for line in lines[1:])


def test_numbers_are_those_of_the_answers(files: Path, tmp_path: Path):
    report = evaluate(config_of(files, tmp_path, "a", answer=f"{files}/mine.py:first"))
    work, found = kept(tmp_path, "a"), report.models[0].estimates
    greedy = [work[f"greedy/{i}"][0] for i in range(6)]
    samples = [work[f"sampled-{N}/{i}"] for i in range(6)]
    right = [[any(x.isdigit() for x in answer["text"]) for answer in group] for group in samples]
    assert 0 < sum(map(sum, right)) < 6 * N  # else nothing is told apart
    assert found["accuracy"].value == sum(any(x.isdigit() for x in answer["text"]) for answer in greedy) / 6
    assert found["sampled/accuracy"].value == pytest.approx(sum(map(sum, right)) / (6 * N))
    assert found["tokens"].value == sum(answer["tokens"] for answer in greedy) / 6
    for k in (1, 2, 4):
        passed = [sum(map(any, combinations(each, k))) / math.comb(N, k) for each in right]
        assert found[f"pass@{k}"].value == pytest.approx(sum(passed) / 6)
    assert found["maj@1"].value == pytest.approx(found["pass@1"].value)
    tokens = [sum(answer["tokens"] for answer in group) for group in samples]
    entropy = [sum(each["entropy"] for each in work[f"measured-sampled-{N}/{i}"]) for i in range(6)]
    assert found["entropy"].value == pytest.approx(sum(e / n for e, n in zip(entropy, tokens, strict=True)) / 6)
    assert 0 < found["entropy"].value < math.log(97) and "kl" not in found
    assert sum(each.count for each in report.models[0].calibration["probability"].bins) == 6
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["models"]["a"]["metrics"]["accuracy"]["value"] == found["accuracy"].value
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_and_kl_are_those_of_the_logits(temperature: float):
    model, other = tiny.model("qwen3", seed=0), tiny.model("llama", seed=1)
    prompts, answers = [[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 1], []]
    found = measured(model, other, prompts, answers, temperature, nullcontext())

    def wanted(dtype: torch.dtype) -> torch.Tensor:  # (S, 3)
        p, q = ([m.to(dtype)(torch.tensor([x + y])).logits[0] for x, y in zip(prompts, answers, strict=True)]
                for m in (model, other))  # fmt: skip
        rows = []
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            at = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
            lp, lq = ((x[i][at] / temperature).log_softmax(-1) for x in (p, q))
            logp = lp.gather(1, torch.tensor(answer, dtype=torch.int64)[:, None]).sum()
            rows.append(torch.stack([logp, -(lp.exp() * lp).sum(), (lp.exp() * (lp - lq)).sum()]))
        return torch.stack(rows)

    with torch.no_grad():
        same, truth = wanted(torch.float32), wanted(torch.float64)
    ours = torch.tensor([[each.logp, each.entropy, each.kl] for each in found])
    assert truth[:2].abs().min() > 0.01 and not truth[2].any()
    assert_close_to_truth(ours, same, truth)


def test_kl_to_itself_is_zero_and_to_another_is_not(files: Path, tmp_path: Path):
    report = evaluate(config_of(files, tmp_path, "a", "b", reference=str(files / "a")))
    assert report.models[0].estimates["kl"].value == 0
    assert report.models[1].estimates["kl"].low > 1


def test_a_model_and_its_copy_do_not_differ_and_tie(files: Path, tmp_path: Path):
    (tmp_path / "again").symlink_to(files / "a")
    twice = config_of(files, tmp_path / "out", model=[str(files / "a"), str(tmp_path / "again")])
    found = evaluate(twice).comparisons[0]
    assert (found.first, found.second) == ("a", "again")
    assert all(each.estimate.value == 0 and each.p == 1 for each in found.differences.values())
    assert found.win_rate is not None and found.win_rate.plain.value == 0.5
    assert found.win_rate.length_controlled.value == pytest.approx(0.5) and found.win_rate.longer_by == 0


def test_three_models_are_compared_two_by_two_and_corrected(files: Path, tmp_path: Path):
    found = evaluate(config_of(files, tmp_path, "a", "b", "c", num_generations=2)).comparisons
    assert [(each.first, each.second) for each in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    p = [each.differences["entropy"].p for each in found]
    assert min(each.differences["entropy"].p_holm for each in found) == pytest.approx(min(1, 3 * min(p)))
    assert max(each.differences["entropy"].p_holm for each in found) >= max(p)


def test_a_difference_is_over_the_prompts_that_both_have(files: Path):
    found = difference("accuracy", [1.0, None, 0.0, 0.0], [1.0, 1.0, None, 1.0], HOW)
    assert found is not None and found.estimate.n == 2 and found.estimate.value == 0.5
    assert found.p == 1.0  # McNemar, one discordant prompt
    assert difference("kl", [None, 1.0], [1.0, None], HOW) is None


# ---- resuming ----


def test_what_is_done_is_not_done_again_and_a_model_may_join(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    evaluate(config_of(files, tmp_path, "a", judge=f"{files}/mine.py:long"))
    calls: list[tuple[str, int]] = []
    generate = sys.modules["fastpost.rollout.sampler"].generate

    def counted(model: Any, tokenizer: Any, prompt_ids: Any, *rest: Any, **more: Any) -> Any:
        calls.append((model.config._name_or_path, len(prompt_ids)))
        return generate(model, tokenizer, prompt_ids, *rest, **more)

    monkeypatch.setattr("fastpost.rollout.sampler.generate", counted)
    both = config_of(files, tmp_path, "a", "b", judge=f"{files}/mine.py:long", confidence=0.9)
    first = evaluate(both)
    assert {Path(name).name for name, _ in calls} == {"b"} and sum(n for _, n in calls) == 12
    calls.clear()
    again = evaluate(both)
    assert not calls and again.comparisons == first.comparisons
    with pytest.raises(ValueError, match="work that was done with seed 1, not 2"):
        evaluate(config_of(files, tmp_path, "a", "b", judge=f"{files}/mine.py:long", seed=2))


# ---- who wins, refusals, pairs ----


def groups(*texts: str) -> list[Group]:
    answers = [Answer(text, len(text), True, reward=float(len(text))) for text in texts]
    return [Group(i, f"prompt {i}", {"answer": i}, [answer]) for i, answer in enumerate(answers)]


def test_a_judge_of_two_answers_is_asked_which_and_one_of_one_how_good(files: Path, tmp_path: Path):
    seen: list[Any] = []

    def prefer(prompts: Any, firsts: Any, seconds: Any, columns: Any) -> list[Preference]:
        seen.append((list(prompts), list(firsts), list(seconds), dict(columns)))
        return [Preference({"ccc": 0.9, "d": None}[text]) for text in firsts]

    config = config_of(files, tmp_path, "a", "b", judge="judge.yaml")
    panel = Panel([SimpleNamespace(prefer=prefer)])  # type: ignore[list-item]
    given = ("a", "b"), ("a", "b"), groups("a", "bb"), groups("ccc", "d")
    for _ in range(2):  # the second time from the journal
        assert won(config, Reward("judge", panel), *given) == [0.9, None]
    assert seen == [(["prompt 0", "prompt 1"], ["ccc", "d"], ["a", "bb"], {"answer": [0, 1]})]
    other = config_of(files, tmp_path / "other", "a", "b", judge="mine.py:long")
    assert won(other, Reward("short", lambda completions, **_: [-len(c) for c in completions]), *given) == [0.0, 1.0]
    assert won(other, None, *given) == [1.0, 0.0]


def test_a_judge_that_did_not_answer_is_asked_again(files: Path, tmp_path: Path):
    seen: list[Any] = []

    def prefer(prompts: Any, firsts: Any, seconds: Any, columns: Any) -> list[Preference]:
        seen.append(list(prompts))
        down = Preference(None, errors=("is out of reach",))
        return [down if prompt == "prompt 1" and len(seen) == 1 else Preference(0.9) for prompt in prompts]

    config, panel = config_of(files, tmp_path, "a", "b", judge="judge.yaml"), Panel([SimpleNamespace(prefer=prefer)])  # type: ignore[list-item]
    given = ("a", "b"), ("a", "b"), groups("a", "bb"), groups("ccc", "d")
    found = [won(config, Reward("judge", panel), *given) for _ in range(3)]
    assert found == [[0.9, None], [0.9, 0.9], [0.9, 0.9]] and seen == [["prompt 0", "prompt 1"], ["prompt 1"]]


def test_refusals_are_counted_by_phrase_or_by_judge(files: Path, tmp_path: Path):
    asked = {"dataset": "", "reward": (), "harmful_dataset": files / "sums.jsonl"}
    by_phrase = evaluate(config_of(files, tmp_path / "phrase", "a", **asked)).models[0].estimates
    assert {name: each.value for name, each in by_phrase.items()} == {"refusal": 0.0}
    asked |= {"benign_dataset": files / "sums.jsonl", "refusal_judge": f"{files}/mine.py:refuses"}
    by_judge = evaluate(config_of(files, tmp_path / "judge", "a", **asked)).models[0].estimates
    texts = [kept(tmp_path / "judge", "a")[f"harmful/{i}"][0]["text"] for i in range(6)]
    assert by_judge["refusal"].value == by_judge["over_refusal"].value == sum("a" in text for text in texts) / 6


def test_what_the_judge_of_refusals_does_not_judge_is_left_out(files: Path, tmp_path: Path):
    (tmp_path / "some.py").write_text(
        "def some(prompts, **_):\n    return [None if p in ('0+0=', '1+1=') else float(p == '2+2=') for p in prompts]\n"
    )
    asked = {"dataset": "", "reward": (), "harmful_dataset": files / "sums.jsonl"}
    found = evaluate(config_of(files, tmp_path / "out", "a", **asked, refusal_judge=f"{tmp_path}/some.py:some"))
    refusal = found.models[0].estimates["refusal"]
    assert (refusal.value, refusal.n) == (1 / 4, 4)


def test_a_reward_that_applies_to_nothing_is_said(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "none.py").write_text("def none(completions, **_):\n    return [None] * len(completions)\n")
    evaluate(config_of(files, tmp_path / "out", "a", reward=f"{tmp_path}/none.py:none"))
    assert "none.py:none applied to no greedy answer of a: it has no accuracy" in capsys.readouterr().err


def test_a_reward_that_likes_length_is_right_where_the_better_one_is_longer(files: Path, tmp_path: Path):
    asked = {"dataset": "", "model": (), "pairs_dataset": files / "pairs.jsonl", "reward": f"{files}/mine.py:long"}
    found = evaluate(config_of(files, tmp_path, **asked)).pairs["long"]
    assert found.accuracy.value == found.longer == 2.5 / 4
    shares = {kind: (each.value, each.n) for kind, each in found.by_length.items()}
    assert shares == {"much shorter": (0.0, 1), "as long": (0.5, 1), "much longer": (1.0, 2)}
    assert {kind: each.n for kind, each in found.by_format.items()} == {"both plain": 4}


def test_kinds_of_pairs():
    assert [length_kind("x" * n, "x" * 19) for n in (3, 12, 19, 25, 50)] == [
        *("much shorter", "shorter", "as long", "longer", "much longer"),
    ]
    assert length_kind("", "") == "as long"
    plain, rich = "Take two eggs - or 3.", "# Eggs\n- take **two**\n- boil"
    assert format_kind(rich, plain) == "better one has more formatting"
    assert format_kind(plain, rich) == "better one has less formatting"
    assert format_kind(plain, plain) == "both plain" and format_kind(rich, rich) == "both formatted"


def test_what_votes_is_read_as_the_reward_reads_it(files: Path):
    assert extraction("auto", ["number_match"])("so 1,200.50 it is") == extraction("number", [])("1200.5")
    assert extraction("auto", ["exact_match"])("  4\n") == "4" and extraction("text", [])("  ") is None
    assert extraction(f"{files}/mine.py:first", [])("xyz") == "x"
    read = extraction("auto", ["accuracy_reward"])
    assert read(r"so \boxed{1} no, \boxed{ \frac{1}{2} }.") == r"\frac{1}{2}" and read(r"\boxed{\frac{1}") is None
    assert (
        read("it is 100.00") == read(r"\boxed{100}")
        and read("I say 12.50") == read(r"\boxed{12.5}")
        and read("I do not know") is None
    )
    assert extraction("auto", ["choice_match"])("The answer is (B).") == "B"
    with pytest.raises(ValueError, match="answer must be"):
        extraction("numbr", [])


@pytest.mark.parametrize("body, said", [("[text]", "unhashable type: 'list'"), ("text.nothing", "AttributeError")])
def test_a_vote_that_cannot_be_counted_is_named(tmp_path: Path, body: str, said: str):
    (tmp_path / "votes.py").write_text(f"def vote(text):\n    return {body}\n")
    with pytest.raises(ValueError, match=f"votes.py:vote must give a text, a number or None.*'so 4'.*{said}"):
        extraction(f"{tmp_path}/votes.py:vote", [])("so 4")


# ---- the command ----


def test_the_command_prints_a_table(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(files)
    words = f"eval --model a b --dataset sums.jsonl --reward number_match --num_generations 2 --output_dir {tmp_path}"
    words += " --pairs_dataset pairs.jsonl --pairs_reward mine.py:digits --max_completion_length 5"
    assert main(words.split()) == 0
    said = capsys.readouterr().out
    for line in ("accuracy ", "pass@2 ", "ECE of the vote", "b - a", "b wins against a: ", "digits, pairs"):
        assert any(text.strip().startswith(line) for text in said.splitlines()), (line, said)
    assert not [text for text in said.splitlines() if text != text.rstrip()]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset": ""}, "must be given: what to evaluate on"),
        ({"model": ()}, "model must be given, one or more"),
        ({"reward": ()}, "reward must be given: what judges the answers of dataset"),
        ({"reward": (), "dataset": "", "pairs_dataset": "x"}, "pairs_reward, or reward, must be given"),
        ({"temperature": 0}, "temperature must be above 0 for samples"),
        ({"pass_k": (1, 9)}, "pass_k must be at most num_generations, 4, got 9"),
        ({"model": ("x/a", "x/a")}, "model must hold each model once"),
        ({"confidence": 1.5}, "confidence must be at most"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_by_name(files: Path, tmp_path: Path, changes: dict, said: str):
    with pytest.raises(ValueError, match=said):
        config_of(files, tmp_path, "a", **changes)


def test_the_recipe_is_a_config():
    config = read_config(Eval, ["--config", str(ROOT / "recipes" / "eval.yaml")])
    assert config.names == ["sft", "dpo", "grpo"] and config.ks == [1, 2, 4, 8, 16]


def test_models_of_one_name_are_told_apart_by_their_paths(files: Path, tmp_path: Path):
    assert config_of(files, tmp_path, model=["runs/x/last", "runs/y/last"]).names == ["runs_x_last", "runs_y_last"]
    assert config_of(files, tmp_path, model=["runs/x", "runs/y/"]).names == ["x", "y"]


def test_a_model_here_has_the_name_of_its_directory(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(files / "a")
    config = config_of(files, tmp_path, model=["."])
    assert config.names == ["a"] and config_of(files, tmp_path, model=[".."]).names == [files.name]
    assert config_of(files, tmp_path, model=["../b", "."]).names == ["b", "a"]


def test_a_reference_of_another_vocabulary_is_refused(files: Path, tmp_path: Path):
    other = tiny.tokenizer()
    other.add_tokens(["new"])
    tiny.model("qwen3", vocab_size=98).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another vocabulary"):
        evaluate(config_of(files, tmp_path / "out", "a", reference=str(tmp_path / "other")))
