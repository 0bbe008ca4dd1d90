"""Online DPO: which pairs it makes, the gradient of a step against float64, judges that compare, resume, learning."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

import preference_runs as runs
import tiny
from endpoints import Handler, asked, serving
from fastpost import metrics
from fastpost.cli import main
from fastpost.data import Prompt
from fastpost.judging import Preference
from fastpost.rewards import Scores
from fastpost.rollout import Completion
from fastpost.trainers.comparing import preferred
from fastpost.trainers.config import OnlineDpo
from fastpost.trainers.dpo import loss_of
from fastpost.trainers.online_dpo import facts_of, online_dpo, pairs_of
from fastpost.trainers.pairs import Objective, backward
from fastpost.trainers.reference import Reference
from fastpost.trainers.rollouts import Rollouts
from rules import assert_close_to_truth, assert_gradient_close_to_truth

NAN = float("nan")
REWARDS = (1.0, 3.0, 2.0, NAN, -1.0, 0.5, 0.0, 0.0, 0.0)  # of three groups of three
LENGTHS = (3, 5, 2, 4, 6, 1, 2, 2, 3)


def config_of(files: Path | str = "f", out: Path | str = "o", **changes) -> OnlineDpo:
    fields = {"reward": "number_match", "max_completion_length": 6, "dataset": Path(files) / "prompts.jsonl"}
    return OnlineDpo(**runs.fields(Path(files), Path(out), **(fields | {"max_steps": 4, "save_steps": 2} | changes)))


def rollouts_of(rewards: tuple[float, ...] = REWARDS) -> Rollouts:
    draw = torch.Generator().manual_seed(2)
    ids = lambda n: torch.randint(5, 97, (n,), generator=draw).tolist()  # noqa: E731
    prompts = [prompt for name in "pqr" for prompt in [Prompt(name, ids(3), {})] * 3][: len(rewards)]
    completions = [Completion(ids(n), finished=n != 5) for n in LENGTHS[: len(rewards)]]
    scores = Scores(torch.tensor(rewards), {"f": torch.tensor(rewards)}, {})
    texts = [f"text {i}" for i in range(len(rewards))]
    return Rollouts(prompts, completions, texts, scores, {"step_time/rollout": 1.0, "step_time/reward": 1.0})


def places(rollouts: Rollouts, config: OnlineDpo) -> list[tuple[int, int]]:
    """Which completions are chosen and rejected, by what they say."""
    both = zip(rollouts.prompts, rollouts.completions, strict=True)
    where = {(*prompt.input_ids, *completion.ids): i for i, (prompt, completion) in enumerate(both)}
    pairs = pairs_of(rollouts, config)
    return [tuple(where[tuple(each.input_ids)] for each in pair.examples) for pair in pairs]  # type: ignore[misc]


# ---- pairs ----


def test_a_pair_is_the_best_and_the_worst_of_a_prompt_that_differ():
    assert places(rollouts_of(), config_of(num_generations=3)) == [(1, 0), (5, 4)]
    assert places(rollouts_of(), config_of(num_generations=3, missing_eos_penalty=2.5)) == [(2, 1), (5, 4)]
    assert places(rollouts_of(), config_of(num_generations=3, mask_truncated_completions=True)) == [(2, 0), (5, 4)]
    assert pairs_of(rollouts_of((NAN,) * 9), config_of(num_generations=3)) == []


def test_who_compares_gives_both_their_probability():
    rollouts = rollouts_of((0.25, 0.0, 0.0, 0.5))
    rollouts = replace(rollouts, prompts=[Prompt("p", [5], {"answer": "1"})] * 2 + [rollouts.prompts[3]] * 2)
    asked = []

    def prefer(*given: Any) -> list[float | None]:
        asked.append(given)
        return [0.25, None]

    found = preferred(rollouts, prefer)
    assert asked == [(["p", "q"], ["text 0", "text 2"], ["text 1", "text 3"], {"answer": ["1", None]})]
    assert found.scores.by_function["prefer"].tolist() == [0.25, 0.75, 0.5, 0.5]
    assert found.scores.rewards.tolist() == [0.5, 0.75, 0.5, 1.0]
    assert found.scores.metrics == {"judge/ties": 0, "judge/undecided": 0.5, "judge/missing_votes": 0}
    with pytest.raises(ValueError, match="prefer must return one probability a pair, got 1 for 2"):
        preferred(rollouts, lambda *given: [0.5])
    with pytest.raises(ValueError, match=r"prefer must return probabilities, got 1.5 for pair 1"):
        preferred(rollouts, lambda *given: [0.5, 1.5])


def test_neither_ties_nor_pairs_without_a_verdict_are_learnt_from_and_all_are_counted():
    swayed, tie = Preference(0.5, orders=(1.0, 0.0)), Preference(0.5, orders=(0.5, 0.5))
    undecided = Preference(None, orders=(1.0, None), errors=("no verdict",))
    said = [Preference(0.25, orders=(0.25, 0.25)), swayed, undecided, tie]
    rollouts = rollouts_of((0.0,) * 8)
    found = preferred(replace(rollouts, prompts=[rollouts.prompts[i // 2] for i in range(8)]), lambda *_: said)
    assert found.scores.by_function["prefer"].tolist() == [0.25, 0.75] + [0.5] * 6
    assert places(found, config_of()) == [(1, 0)]
    shares = {"ties": 0.5, "undecided": 0.25, "missing_votes": 0.25, "flips": 1 / 3, "first_place_wins": 3 / 4}
    assert found.scores.metrics == {f"judge/{name}": pytest.approx(value) for name, value in shares.items()}


def test_a_conversation_is_compared_with_what_its_tools_said():
    called = [{"role": "assistant", "content": ""}, {"role": "tool", "content": "7"}]
    rollouts, seen = rollouts_of((0.0, 0.0)), []
    completions = [replace(rollouts.completions[0], messages=called), rollouts.completions[1]]
    preferred(replace(rollouts, completions=completions), lambda *given: seen.append(given[1:3]) or [0.5])
    assert seen == [([called], ["text 1"])]


def test_what_tools_said_is_read_and_not_learnt():
    rollouts = rollouts_of((1.0, 0.0, 0.0))
    called = replace(rollouts.completions[0], own=[True, False, True])
    (pair,) = pairs_of(replace(rollouts, completions=[called, *rollouts.completions[1:]]), config_of(num_generations=3))
    assert [example.predicted for example in pair.examples] == [[3, 5], [3, 4, 5, 6, 7]]


# ---- a step ----


def plain(model: nn.Module, other: nn.Module, config: OnlineDpo) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradient by Hugging Face's own logits, and what the log shows: TRL's equations on sums of sequences."""
    each, seen = [], []
    for pair in pairs_of(rollouts_of(), config):
        (w, r), (ref_w, ref_r) = ([runs.logps(of, example).sum() for example in pair.examples] for of in (model, other))
        d = (w - ref_w.detach()) - (r - ref_r.detach())
        each.append(-F.logsigmoid(0.1 * d))
        seen.append(torch.stack([w - ref_w + r - ref_r, -(w + r)]).detach() / 2)
    loss = torch.stack(each).mean()
    return loss.detach(), runs.gradient(loss, model), torch.stack(seen).mean(0)


@pytest.mark.parametrize("rows", runs.ROWS)
def test_a_step_has_the_gradient_of_the_mean_over_its_pairs(rows: dict):
    config = config_of(num_generations=3, max_completion_length=6, **rows)
    other = Reference.apart(tiny.model("qwen3", seed=1), config).scored
    objective = Objective(loss_of(config), lambda stats, batch: metrics.preference(stats, batch), other)
    model, rollouts = tiny.model("qwen3").train(), rollouts_of()
    values = backward(model, pairs_of(rollouts, config), objective, config)
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    (loss32, grad32, seen32), (loss64, grad64, seen64) = (
        plain(tiny.model("qwen3").to(dtype), tiny.model("qwen3", seed=1).to(dtype), config)
        for dtype in (torch.float32, torch.float64)
    )
    assert_gradient_close_to_truth(ours, grad32, grad64)
    assert_close_to_truth(torch.tensor(values["loss"]), loss32, loss64)
    facts = facts_of(rollouts, values, config)
    for name, same, truth in zip(("objective/kl", "objective/entropy"), seen32, seen64, strict=True):
        assert_close_to_truth(torch.tensor(facts[name]), same, truth, name)
    assert facts["objective/scores"] == pytest.approx(5.5 / 8)
    assert facts["objective/scores_margin"] == pytest.approx((2 + 1.5 + 0) / 3)
    assert facts["objective/non_score_reward"] == pytest.approx(-0.1 * facts["objective/kl"])
    assert facts["val/contain_eos_token"] == pytest.approx(8 / 9)


# ---- whole runs ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = runs.write_files(tmp_path_factory.mktemp("files"))
    (found / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{x} "}) + "\n" for x in "abcdefgh"))
    return found


def capitals(completions: list[str], **columns: Any) -> list[float]:
    return [sum("A" <= x <= "Z" for x in text) / 6 for text in completions]


def more_capitals(prompts: list[str], firsts: list[str], seconds: list[str]) -> list[float | None]:
    both = [(capitals([a])[0], capitals([b])[0]) for a, b in zip(firsts, seconds, strict=True)]
    return [None if a == b else float(a > b) for a, b in both]


KINDS = {
    "whole": ({}, {"reward_funcs": capitals}),
    "adapter, the best of four by IPO": (
        {"lora_r": 2, "lora_dropout": 0.1, "num_generations": 4, "loss_type": "ipo", "missing_eos_penalty": 0.1},
        {"reward_funcs": capitals},
    ),
    "who compares": ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1, 0.1)}, {"prefer": more_capitals}),
}


@pytest.mark.parametrize(("changes", "given"), KINDS.values(), ids=KINDS)
def test_k_steps_and_a_resume_give_the_bits_of_the_straight_run(
    files: Path, tmp_path: Path, changes: dict, given: dict
):
    config: Callable[..., OnlineDpo] = lambda out, **more: config_of(files, out, reward=(), **changes, **more)  # noqa: E731
    online_dpo(config(tmp_path / "straight"), **given)
    online_dpo(config(tmp_path / "on", resume_from_checkpoint=tmp_path / "straight" / "checkpoint-2"), **given)
    assert runs.weights(tmp_path / "on") == runs.weights(tmp_path / "straight")
    assert runs.lines(tmp_path / "on") == runs.lines(tmp_path / "straight")[2:]
    assert runs.lines(tmp_path / "on")[0]["grad_norm"] > 0


def test_the_reward_rises(files: Path, tmp_path: Path):
    size = {"max_steps": 30, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "save_steps": 0}
    more = {"learning_rate": 5e-3, "num_generations": 3, "logging_steps": 5, "eval_dataset": files / "prompts.jsonl"}
    online_dpo(config_of(files, tmp_path, reward=(), **size, **more), reward_funcs=capitals)
    lines = runs.lines(tmp_path)
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.2
    assert lines[-1]["eval_reward"] > 0.5
    assert {"objective/kl", "objective/rlhf_reward", "logps/chosen", "rewards/accuracies"} <= lines[0].keys()


def by_capitals(handler: Handler, body: dict) -> None:
    """A judge who sees no difference takes the first answer, and who sees a brace says nothing."""
    a, b = capitals(asked(body)[1:])
    system = body["messages"][0]["content"]
    assert "more capitals, as in HELLO" in system
    handler.say("?" if "{" in str(asked(body)[1:]) else f"Verdict: {'B' if b > a else 'A'}")


def test_a_judge_of_a_file_compares_and_the_policy_learns_what_it_likes(files: Path, tmp_path: Path):
    rows = [{"prompt": f"{x} ", "like": "HELLO"} for x in "abcdefgh"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(by_capitals) as server:
        judge = f"model: m\nendpoint: {server.url}\nrubric: more capitals, as in $like\nreasks: 0\n"
        (tmp_path / "judge.yaml").write_text(judge)
        given = {"model": files / "model", "dataset": tmp_path / "prompts.jsonl", "judge": tmp_path / "judge.yaml"}
        given |= {"output_dir": tmp_path / "run", "max_completion_length": 6, "max_steps": 30, "logging_steps": 1}
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        assert main(["online-dpo", *words, "--learning_rate", "5e-3", "--save_steps", "0"]) == 0
    lines = runs.lines(tmp_path / "run")
    flips, ties, undecided = ([line[f"judge/{name}"] for line in lines] for name in ("flips", "ties", "undecided"))
    assert 0 < sum(flips) < len(lines) and max(undecided) > 0
    assert all(line["judge/first_place_wins"] >= 0.5 for line in lines)
    assert all(line["frac_reward_zero_std"] == a + b for line, a, b in zip(lines, ties, undecided, strict=True))
    seen = [sum(capitals(asked(body)[1:])) / 2 for body in server.seen]
    early, late = seen[: len(seen) // 5], seen[-len(seen) // 5 :]
    assert sum(late) / len(late) > sum(early) / len(early) + 0.1


def test_prompts_whose_completions_are_all_as_good_teach_nothing(files: Path, tmp_path: Path):
    model = tiny.model("qwen3")
    before = [p.clone() for p in model.parameters()]
    same = {"reward_funcs": lambda completions, **_: [1.0] * len(completions), "model": model}
    online_dpo(config_of(files, tmp_path, reward=(), max_steps=2), **same, processing_class=tiny.tokenizer())  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert runs.lines(tmp_path)[0]["frac_reward_zero_std"] == 1


@pytest.mark.parametrize(
    ("changes", "given", "said"),
    [
        (
            {"num_generations": 3},
            {"prefer": more_capitals},
            "prefer compares two completions: .* must be 2, got 3",
        ),
        (
            {"num_generations": 3, "judge": "no.yaml"},
            {},
            "judge compares two completions: num_generations must be 2, got 3",
        ),
        ({"judge": "no.yaml"}, {"prefer": more_capitals}, "leave out one of them"),
        ({"judge": "no.yaml"}, {}, "cannot read the judge no.yaml"),
        ({"max_tokens_per_batch": 10}, {"prefer": more_capitals}, "hold the longest pair, 16 tokens, got 10"),
        ({"eval_dataset": "prompts.jsonl"}, {"prefer": more_capitals}, "an evaluation is by reward"),
        ({}, {}, "reward must name at least one function"),
        ({"ld_alpha": 0.5, "loss_type": "sft"}, {"prefer": more_capitals}, "loss_type sft has no ld_alpha"),
    ],
)
def test_what_cannot_be_is_refused(files: Path, tmp_path: Path, changes: dict, given: dict, said: str):
    changes = {name: files / x if name == "eval_dataset" else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=said):
        online_dpo(config_of(files, tmp_path / "out", reward=(), **changes), **given)
    assert not (tmp_path / "out").exists()
