"""`fastpost best-of-n`: the best is kept, and its distribution and KL are those that a model small enough to write out
has exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from torch import Tensor

import tiny
from fastpost.cli import main
from fastpost.data import sft_examples
from fastpost.files import read_rows
from fastpost.stages.best_of_n import best, best_of_n
from fastpost.stages.config import BestOfN
from fastpost.stages.groups import Answer
from fastpost.stages.order_statistics import expected_best, kl_bound

ROOT = Path(__file__).resolve().parents[1]
V, EOS, PROMPT = tiny.SHAPE["vocab_size"], tiny.SHAPE["eos_token_id"], "7+7="
OUTCOMES = V + V * V  # one token that ends it, or two; those that cannot be have probability 0
SHUFFLE = 7919  # coprime to OUTCOMES: rewards are distinct, and have nothing to do with the probabilities
REWARDS = f"""
def place(completions, completion_ids, **_):
    numbers = [ids[0] if len(ids) == 1 else {V} + {V} * ids[0] + ids[1] for ids in completion_ids]
    return [float(number * {SHUFFLE} % {OUTCOMES}) for number in numbers]

def coarse(**columns):
    return [float(reward // 2000) for reward in place(**columns)]

def long(completions, ask, **_):
    return [None if a == "nothing" else float(len(c)) for c, a in zip(completions, ask)]

def never(completions, **_):
    return [None] * len(completions)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    tiny.model("qwen3").save_pretrained(directory / "model")
    tiny.tokenizer().save_pretrained(directory / "model")
    (directory / "rewards.py").write_text(REWARDS)
    write(directory / "same.jsonl", [{"prompt": PROMPT}] * 300)
    write(directory / "rows.jsonl", [{"prompt": f"{i}+1=", "ask": "nothing" if i == 2 else "much"} for i in range(6)])
    chat = [{"prompt": [{"role": "user", "content": f"{i}?"}], "ask": "", "tools": []} for i in range(2)]
    write(directory / "chat.jsonl", chat)
    return directory


def write(file: Path, rows: list) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(files: Path, out: Path, reward: str, rows: str = "rows", **changes: object) -> BestOfN:
    fields = {"max_completion_length": 8, "num_generations": 4, "generation_batch_size": 1200}
    fields |= {"model": files / "model", "dataset": files / f"{rows}.jsonl", "output_dir": out}
    return BestOfN(**(fields | {"reward": (f"{files}/rewards.py:{reward}",)} | changes))


# ---- the measurement: every outcome of two tokens, in float64 ----


@pytest.fixture(scope="module")
def policy() -> Tensor:  # (OUTCOMES,) float64, by reward
    """The probability of each outcome, the one with reward 0 first."""
    model = tiny.model("qwen3").double()
    ids = tiny.tokenizer()(PROMPT).input_ids
    rows = torch.tensor([[*ids, token] for token in range(V)])
    with torch.no_grad():
        p = model(rows).logits[:, -2:].softmax(-1)
    first, second = p[0, 0], p[:, 1].clone()
    alone = torch.where(torch.arange(V) == EOS, first, 0.0)
    second[EOS] = 0  # nothing follows the end
    together = torch.cat([alone, (first[:, None] * second).flatten()])
    torch.testing.assert_close(together.sum(), torch.ones((), dtype=torch.float64))
    by_reward = torch.empty_like(together)
    by_reward[torch.arange(OUTCOMES) * SHUFFLE % OUTCOMES] = together
    return by_reward


def best_of(policy: Tensor, n: int) -> Tensor:
    """F(r)^n - F(r-)^n, without cancellation: (F-)^n ((1 + p / F-)^n - 1)."""
    upper = policy.cumsum(0)
    lower = upper - policy
    return torch.where(lower > 0, lower**n * torch.expm1(n * torch.log1p(policy / lower)), upper**n)


def kl(p: Tensor, q: Tensor) -> float:
    kept = p > 0
    return float((p[kept] * (p[kept] / q[kept]).log()).sum())


def most_lost(policy: Tensor, n: int) -> float:
    """Of the bound, to outcomes that are not infinitely small: in each, the log of its largest density, that of U^n,
    over the mean one."""
    best, upper = best_of(policy, n), policy.cumsum(0)
    kept = best > 0
    return float((best * (n * upper ** (n - 1) * policy / best).log())[kept].sum())


@pytest.mark.parametrize("n", [4, 16, 64])
def test_the_exact_kl_is_the_formula_but_for_the_size_of_the_outcomes(policy: Tensor, n: int):
    exact, lost = kl(best_of(policy, n), policy), most_lost(policy, n)
    assert kl_bound(n) - lost <= exact <= kl_bound(n)
    print(f"n {n}: exact {exact:.4f}, formula {kl_bound(n):.4f}, at most {lost:.4f} lost")
    assert f"{exact:.1f}" == f"{kl_bound(n):.1f}"


@pytest.mark.parametrize("n", [4, 16, 64])
def test_what_the_verb_keeps_is_so_distributed_and_has_that_kl(policy: Tensor, files: Path, tmp_path: Path, n: int):
    best_of_n(config_of(files, tmp_path, "place", "same", num_generations=n, max_completion_length=2))
    kept = torch.tensor([int(row["reward"]) for row in read_rows(tmp_path / "best.jsonl")])
    exact, rows = best_of(policy, n), len(kept)
    seen = torch.bincount(kept, minlength=OUTCOMES).cumsum(0) / rows
    # Dvoretzky, Kiefer, Wolfowitz: further off once in a million samples
    assert float((seen - exact.cumsum(0)).abs().max()) <= math.sqrt(math.log(2e6) / (2 * rows))
    ratios = (exact / policy).log()
    mean = float(exact @ ratios.nan_to_num())
    error = math.sqrt(float(exact @ (ratios.nan_to_num() - mean) ** 2) / rows)
    measured = float(ratios[kept].mean())
    print(f"n {n}: measured {measured:.3f} +- {error:.3f}, exact {mean:.3f}, formula {kl_bound(n):.3f}")
    assert abs(measured - mean) <= 5 * error


def test_ties_lower_it(files: Path, tmp_path: Path, policy: Tensor):
    report = best_of_n(config_of(files, tmp_path, "coarse", "same", num_generations=16, max_completion_length=2))
    level = torch.arange(OUTCOMES) // 2000
    shares = torch.zeros(int(level[-1]) + 1, dtype=torch.float64).index_add(0, level, policy)
    exact = kl(best_of(shares, 16), shares)
    last = report["curve"][-1]
    assert last["n"] == 16 and exact < last["kl_bound"] == kl_bound(16)
    assert last["kl"] < last["kl_bound"]


# ---- the files ----


def test_the_earliest_of_the_best_is_kept_and_none_that_nobody_judged():
    rewards = (None, 1.0, 3.0, None, 3.0, 2.0)
    answers = [Answer(str(i), 1, True, reward=reward) for i, reward in enumerate(rewards)]
    assert best(answers) == answers[2]
    assert best(answers[:1]) is None


def test_the_rows_the_curve_and_the_lengths(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report = best_of_n(config_of(files, tmp_path, "long", num_generations=6))
    groups = {}
    for key, answers in map(json.loads, (tmp_path / "work.jsonl").read_text().splitlines()[1:]):
        groups[int(key.split("/")[1])] = answers
    rows = read_rows(tmp_path / "best.jsonl")
    assert [row["prompt"] for row in rows] == [f"{i}+1=" for i in range(6) if i != 2]  # nobody judged that one
    judged = [groups[i] for i in range(6) if i != 2]
    for row, answers in zip(rows, judged, strict=True):
        longest = max(answers, key=lambda answer: len(answer["text"]))
        assert row == {"prompt": row["prompt"], "completion": longest["text"], "reward": len(longest["text"])}
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert [point["n"] for point in report["curve"]] == [1, 2, 4, 6]
    for point in report["curve"]:
        scores = [expected_best([answer["reward"] for answer in answers], point["n"]) for answers in judged]
        assert point["score"] == pytest.approx(sum(scores) / 5)
    assert report["mean_length"] == pytest.approx(sum(a["tokens"] for g in judged for a in g) / 30)
    assert report["mean_length_best"] > report["mean_length"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "n" and [line.split()[0] for line in lines[1:]] == ["1", "2", "4", "6"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_a_conversation_is_answered_by_a_message_and_is_read_by_sft(files: Path, tmp_path: Path):
    best_of_n(config_of(files, tmp_path, "long", "chat"))
    rows = read_rows(tmp_path / "best.jsonl")
    assert [row["completion"][0]["role"] for row in rows] == ["assistant"] * 2 and rows[0]["tools"] == []
    examples, counts = sft_examples(rows, tiny.tokenizer(), 64, None, False)
    assert len(examples) == 2 and all(any(example.predicted) for example in examples), counts


def test_the_same_command_again_asks_for_nothing(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of(files, tmp_path, "long")
    first = best_of_n(config)
    rows = (tmp_path / "best.jsonl").read_bytes()
    work = (tmp_path / "work.jsonl").read_bytes()
    (tmp_path / "work.jsonl").write_bytes(work[: len(work) // 2])  # killed as it was half done
    assert best_of_n(config) == first and (tmp_path / "best.jsonl").read_bytes() == rows
    assert (tmp_path / "work.jsonl").read_bytes() == work
    monkeypatch.setattr("fastpost.stages.asking._groups", None)
    assert best_of_n(config) == first


def test_bad_input_is_named(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def said(*more: str) -> str:
        words = f"--model {files}/model --output_dir {tmp_path}/out --max_completion_length 4".split()
        assert main(["best-of-n", *words, *more]) == 2
        return capsys.readouterr().err

    rows = ("--dataset", f"{files}/rows.jsonl")
    assert "applied to no answer of" in said(*rows, "--reward", f"{files}/rewards.py:never")
    assert "num_generations must be above 0" in said(*rows, "--reward", "exact_match", "--num_generations", "0")
    write(tmp_path / "odd.jsonl", [{"question": "1+1="}])
    assert "prompt" in said("--dataset", f"{tmp_path}/odd.jsonl", "--reward", "exact_match")
