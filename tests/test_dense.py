"""Rewards of steps: the advantages against float64 loops, the tokens that steps end with, and runs of ppo and grpo."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from fastpost import Batch
from fastpost.advantages import on_tokens, process_supervision, steps_centred
from fastpost.data import Prompt
from fastpost.data.steps import ended_steps, last_tokens, steps_of
from fastpost.models.scalar import load_scored
from fastpost.packing import Example, pack
from fastpost.packing.subsets import with_known
from fastpost.rewards import Reward, Scores, load_reward
from fastpost.rewards.steps import StepRewards, step_rewards
from fastpost.rollout import Completion
from fastpost.stages.config import BestOfN
from fastpost.stages.jury import Jury
from fastpost.trainers.config import Grpo, OnlineDpo, Ppo, Rloo
from fastpost.trainers.dense import Dense, Steps, parted, placed, rewarded
from fastpost.trainers.episodes import episodes
from fastpost.trainers.grpo import _of_tokens, grpo
from fastpost.trainers.log import read_lines
from fastpost.trainers.ppo import advised, ppo
from fastpost.trainers.rloo import rloo
from fastpost.trainers.rollouts import Rollouts, joined, only_groups, rollout_metrics
from rules import assert_close_to_truth
from timeless import timeless

# ---- formulas ----

MASKS = ["pccc", "ppc.cc", "pcc", "pc", "pcccc", "pp..", "pccc", "pcc"]  # c: a token of the policy's own
GROUP = 2
AT = [2, 0, 7, 8, 8, 5, 11, 15, 18, 21, 24, 28]  # out of order, two on one token, one on an ignored one


def batch_of(masks: list[str] = MASKS) -> Batch:
    return pack([Example([7] * len(mask), [m == "c" for m in mask]) for mask in masks]).batch


def loop(rewards: Tensor, at: list[int], batch: Batch, scale: str) -> Tensor:
    """Process supervision by its definition, in the dtype of the rewards."""
    sequence, kept = batch.sequence.tolist(), (batch.target != -100).tolist()
    groups: dict[int, list[Tensor]] = {}
    for reward, t in zip(rewards, at, strict=True):
        groups.setdefault(sequence[t] // GROUP, []).append(reward)
    found = torch.zeros(len(kept), dtype=rewards.dtype)
    for reward, t in zip(rewards, at, strict=True):
        group = torch.stack(groups[sequence[t] // GROUP])
        over = {"group": group, "batch": rewards, "none": None}[scale]
        deviation = rewards.new_ones(()) if over is None else over.std() if len(over) > 1 else over.new_zeros(())
        own = (reward - group.mean()) / (deviation + (1e-4 if over is not None else 0))
        for i in range(t + 1):
            if sequence[i] == sequence[t] and kept[i] and kept[t]:
                found[i] += own
    return found


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_an_advantage_is_the_sum_of_the_normalised_rewards_of_the_steps_to_come(scale: Any):
    batch, rewards = batch_of(), torch.rand(len(AT))
    ours = process_supervision(rewards, torch.tensor(AT), batch, GROUP, scale)
    same, truth = (loop(rewards.to(dtype), AT, batch, scale) for dtype in (torch.float32, torch.float64))
    assert truth.abs().max() > 0.1
    assert_close_to_truth(ours, same, truth)


def test_steps_of_a_group_that_are_all_worth_the_same_move_nothing_to_the_bit():
    batch, at = batch_of(), torch.tensor([1, 2, 7, 10, 13])
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.3, 0.7])
    ours = process_supervision(rewards, at, batch, GROUP)
    assert torch.equal(ours[batch.sequence < 2], torch.zeros(int((batch.sequence < 2).sum()))) and ours[10] != 0
    assert not process_supervision(rewards[:0], at[:0], batch, GROUP).any()


def test_rewards_of_one_token_add_up():
    batch = batch_of()
    laid = on_tokens(torch.arange(1.0, 13.0), torch.tensor(AT), batch)
    assert laid[8] == 4 + 5 and laid.sum() == 78 and laid.count_nonzero() == 11


@pytest.mark.parametrize(
    ("rewards", "at", "group", "said"),
    [
        ([0.1], [40], 2, "at must hold positions of the batch, 0 to 30, got 40 to 40"),
        ([0.1, 0.2], [1], 2, r"at int64 of the same shape.*got \(2,\) and torch.int64 \(1,\)"),
        ([float("inf")], [1], 2, "rewards must be finite"),
        ([0.1], [1], 3, "group_size must divide the 8 sequences, got 3"),
    ],
)
def test_what_cannot_be_is_named(rewards: list[float], at: list[int], group: int, said: str):
    with pytest.raises(ValueError, match=said):
        steps_centred(torch.tensor(rewards), torch.tensor(at), batch_of(), group)


# ---- the tokens that steps end with ----

TEXTS = ["1+2=3\n3+4=7\n\nSo 7.", "no separator", "cut off\nin the mid", "ends with it\n", "\n\nbegins\n with it",
         "", "\n", "größe\n≥ 10 🙂\nja 🙂🙂\n\n"]  # fmt: skip


def fast(of: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=of, pad_token="<pad>", eos_token="<eos>")


def merging(pieces: int) -> Any:
    """Byte-level BPE of one piece a text: separators merge with what is beside them, characters fall into bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    many = trainers.BpeTrainer(
        vocab_size=258 + pieces, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text for text in TEXTS for _ in range(3)], many)
    return fast(bpe)


def metaspace() -> Any:
    """Unigram, whose words begin with a mark that the first of a text loses."""
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0)], 0, True))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = ["<unk>", "<pad>", "<eos>"]
    unigram.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    return fast(unigram)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: merging(0),
    "a few merges": lambda: merging(12),
    "many merges": lambda: merging(60),
    "words": metaspace,
}


@pytest.mark.parametrize("separator", ["\n", "\n\n", " "])
@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_step_ends_with_the_first_token_that_completes_it(make: Callable[[], Any], separator: str):
    tokenizer, merged = make(), 0
    for text in TEXTS:
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        steps = ended_steps(text, separator)
        assert [step for step, _ in steps] == steps_of(text, separator) and steps[-1][1] == len(text)
        found = last_tokens(tokenizer, ids, [end for _, end in steps])
        assert len(found) == len(steps) and found[-1] == len(ids) - 1 and found == sorted(found)
        for at, (step, end) in zip(found[:-1], steps, strict=False):
            assert text[:end].endswith(step + separator)
            assert tokenizer.decode(ids[: at + 1], skip_special_tokens=True).startswith(text[:end])
            before = tokenizer.decode(ids[:at], skip_special_tokens=True)
            assert not before.startswith(text[:end])
            merged += len(tokenizer.decode(ids[: at + 1], skip_special_tokens=True)) > end
    if separator == "\n" and make is TOKENIZERS["many merges"]:
        assert merged, "no separator has merged with what follows it"


class Judge:
    """Says of a step how long it is."""

    separator, way = ";", "dense"

    def of_steps(self, prompts: list[Any], completions: list[Any], _: None, **columns: Any) -> list[list[float]]:
        self.asked = prompts
        return [[] if "x" in text else [len(step) / 10 for step in steps_of(text, ";")] for text in completions]


def steps_by_length(completions: list[Completion], prompt: Any = "p") -> tuple[Steps, Judge]:
    judge = Judge()
    prompts = [Prompt(prompt, [5], {}) for _ in completions]
    return rewarded(Dense("d", judge, 0.5), tiny.tokenizer(), prompts, completions), judge  # type: ignore[arg-type]


def said(text: str, finished: bool = True, **more: Any) -> Completion:
    return Completion(tiny.tokenizer()(text).input_ids + [1] * finished, finished, **more)


def test_steps_of_completions_lie_on_their_tokens():
    steps, _ = steps_by_length([said("ab;cde;f"), said("ab;cd", False), said("ab;;"), said(""), Completion([], False)])
    assert steps.rows == [[(2, 0.2), (6, 0.3), (8, 0.1)], [(2, 0.2), (4, 0.2)], [(4, 0.2)], [(0, 0.0)], []]
    assert steps.means.isnan().tolist() == [False] * 4 + [True]
    assert steps_by_length([Completion([], False)])[0].rows == [[]]
    assert steps_by_length([said("ab;xx"), said("ab;")])[0].rows == [[], [(3, 0.2)]]  # the judge had no room for it


def test_of_several_turns_the_last_one_has_steps():
    first, answer, last = (tiny.tokenizer()(text).input_ids for text in ("call;it", "a;tool", "so;it is"))
    asked = [{"role": "user", "content": "q"}]
    turns = [{"role": role, "content": text} for role, text in (("assistant", "call;it"), ("tool", "a;tool"))]
    own = [True] * len(first) + [False] * len(answer) + [True] * len(last)
    answered = [*turns, {"role": "assistant", "content": "so;it is"}]
    steps, judge = steps_by_length([Completion([*first, *answer, *last], True, own=own, messages=answered)], asked)
    assert steps.rows == [[(15, 0.2), (20, 0.5)]]
    assert judge.asked == [[*asked, *turns]]


# ---- in a step ----


def rollouts_of(masks: tuple[str, ...] = ("xxxx", "xxxxxx", "xx.x", "xxx")) -> Rollouts:
    """Of two prompts; a dot is what a tool said."""
    prompts = [Prompt("p", [7, 8], {})] * 2 + [Prompt("q", [7, 8, 9], {})] * 2
    completions = [Completion([9] * len(m), len(m) != 6, own=[c == "x" for c in m]) for m in masks]
    rewards = torch.tensor([1.0, 0.0, 0.25, 0.5])
    steps = Steps(0.5, [[(1, 0.9), (3, 0.4)], [(2, 0.1), (5, 0.2)], [(3, 0.7)], [(0, 0.6), (2, 0.6)]])
    return Rollouts(prompts, completions, ["t"] * 4, Scores(rewards, {"f": rewards}, {}), {}, {"prm_dense": steps})


def grpo_of(files: Path | str = "f", **changes: Any) -> Grpo:
    fields = {"model": f"{files}/model", "dataset": f"{files}/prompts.jsonl", "output_dir": "o", "max_steps": 4}
    fields |= {"reward": "number_match", "num_generations": 2, "per_device_train_batch_size": 4, "save_steps": 2}
    fields |= {"max_completion_length": 6, "logging_steps": 1, "gradient_checkpointing": False}
    return Grpo(**(fields | changes))


def ppo_of(files: Path | str = "f", **changes: Any) -> Ppo:
    fields = {"model": f"{files}/model", "dataset": f"{files}/prompts.jsonl", "output_dir": "o", "max_steps": 8}
    fields |= {"reward": "number_match", "per_device_train_batch_size": 4, "num_ppo_epochs": 2, "save_steps": 4}
    fields |= {"max_completion_length": 6, "logging_steps": 1, "gradient_checkpointing": False, "lora_r": 2}
    return Ppo(**(fields | changes))


def test_in_grpo_a_token_has_the_advantage_of_its_completion_and_of_the_steps_to_come():
    rollouts, config = rollouts_of(), grpo_of(scale_rewards="none")
    whole = episodes(rollouts, config)
    found = _of_tokens(rollouts, whole, config)[whole.batch.target != -100].split([4, 6, 3, 3])
    steps, last = [0.9 - 0.4, 0.4 - 0.4, 0.1 - 0.4, 0.2 - 0.4], [0.7, 0.6, 0.6]
    tool, q = last[0] - statistics.fmean(last), [x - statistics.fmean(last) for x in last[1:]]
    want = [
        [0.5 + 0.5 * x for x in (steps[0] + steps[1], steps[0] + steps[1], steps[1], steps[1])],
        [-0.5 + 0.5 * x for x in [steps[2] + steps[3]] * 3 + [steps[3]] * 3],
        [-0.125 + 0.5 * tool] * 3,
        [0.125 + 0.5 * x for x in (sum(q), q[1], q[1])],
    ]
    for ours, truth in zip(found, want, strict=True):
        torch.testing.assert_close(ours, torch.tensor(truth))


def test_in_ppo_a_step_is_paid_where_it_ends_and_the_completion_at_its_end():
    rollouts, config = rollouts_of(), ppo_of(kl_coef=0.0, gamma=1.0, lam=0.0, mask_truncated_completions=True)
    whole = episodes(rollouts, config)
    T = whole.num_tokens
    whole = with_known(whole, old_logp=torch.zeros(T), ref_logp=torch.zeros(T), old_value=torch.zeros(T))
    advised_, facts = advised(whole, rollouts, 0.0, config)
    assert advised_.batch.return_ is not None
    paid = advised_.batch.return_[whole.batch.target != -100].split([4, 0, 3, 3])
    want = [[0, 0.45, 0, 1.2], [], [0, 0, 0.25 + 0.35], [0.3, 0, 0.8]]
    for ours, truth in zip(paid, want, strict=True):
        torch.testing.assert_close(ours, torch.tensor(truth, dtype=torch.float32))
    total = 1.75 + 0.5 * sum(reward for row in rollouts.steps["prm_dense"].rows for _, reward in row)
    assert facts["objective/scores"] == pytest.approx(total / 4)


def test_what_is_shown_of_steps_survives_choosing_and_joining():
    rollouts = rollouts_of()
    again = joined([only_groups(rollouts, 2, [0]), only_groups(rollouts, 2, [1])])
    assert again.steps == rollouts.steps
    seen = rollout_metrics(again, 2)
    assert seen["rewards/prm_dense/mean"] == pytest.approx((0.65 + 0.15 + 0.7 + 0.6) / 4)
    assert seen["rewards/prm_dense/steps"] == 7 / 4 and seen["rewards/f/mean"] == pytest.approx(1.75 / 4)
    assert seen["reward"] == pytest.approx((1.75 + 0.5 * (0.65 + 0.15 + 0.7 + 0.6)) / 4)
    rewards, at = placed(rollouts.steps["prm_dense"], rollouts.prompts, episodes(rollouts, grpo_of()))
    assert at.tolist() == [2, 4, 6 + 3, 6 + 6, 14 + 5, 21 + 2, 21 + 4] and len(rewards) == 7


# ---- whole runs ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, prompts, a reward, and a model of steps with a head that says something."""
    found = tmp_path_factory.mktemp("files")
    tiny.model("llama").save_pretrained(found / "model")
    tiny.tokenizer().save_pretrained(found / "model")
    judge = load_scored(found / "model", "it", fresh=True)
    torch.manual_seed(2)
    judge.score.weight.data.normal_(0, 0.5)
    judge.save_pretrained(found / "prm")
    tiny.tokenizer().save_pretrained(found / "prm")
    (found / "prm" / "prm.json").write_text('{"step_separator": "e"}')
    (found / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{word} "}) + "\n" for word in "abcdefg"))
    (found / "rewards.py").write_text(
        "def capitals(completions, **columns):\n"
        "    return [sum('A' <= x <= 'Z' for x in text) / 6 for text in completions]\n"
    )
    return found


RUNS = {
    "grpo": (grpo, grpo_of, 2, {}),
    "grpo with an outcome": (grpo, grpo_of, 2, {"outcome": True, "num_iterations": 2, "dynamic_sampling": True}),
    "ppo": (ppo, ppo_of, 4, {}),
    "ppo with an outcome": (ppo, ppo_of, 4, {"outcome": True, "whiten_rewards": True, "num_mini_batches": 2}),
}


@pytest.mark.parametrize(("verb", "config_of", "half", "changes"), RUNS.values(), ids=RUNS)
def test_a_run_resumes_to_the_bit_and_says_what_steps_are_worth(
    files: Path, tmp_path: Path, verb: Any, config_of: Callable[..., Any], half: int, changes: dict[str, Any]
):
    changes, rewards = dict(changes), [f"{files / 'prm'}:dense"]
    if changes.pop("outcome", False):
        rewards, changes["reward_weights"] = [f"{files / 'rewards.py'}:capitals", *rewards], (1.0, 0.5)
    changes |= {"reward": tuple(rewards), "eval_dataset": f"{files}/prompts.jsonl", "eval_steps": 4}
    config = config_of(files, output_dir=tmp_path / "straight", learning_rate=1e-2, **changes)
    verb(config)
    saved = tmp_path / "straight" / f"checkpoint-{half}"
    verb(replace(config, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(saved)))
    for path in (tmp_path / "straight").glob("*.safetensors"):
        assert (tmp_path / "resumed" / path.name).read_bytes() == path.read_bytes()
    straight, resumed = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("straight", "resumed"))
    assert [*map(timeless, resumed)] == [timeless(line) for line in straight if line["step"] > half]
    assert all(0 < line["rewards/prm_dense/mean"] < 1 and line["rewards/prm_dense/steps"] >= 1 for line in straight)
    assert straight[0]["grad_norm"] > 0 and any("eval_reward" in line for line in straight)
    shown = read_lines(tmp_path / "straight" / "completions.jsonl")[0]
    assert shown["rewards/prm_dense"] == pytest.approx(statistics.fmean(shown["rewards/prm_dense/steps"]))


def test_grpo_learns_steps_that_a_model_likes(files: Path, tmp_path: Path):
    changes = {"max_steps": 30, "num_generations": 8, "per_device_train_batch_size": 32, "learning_rate": 1e-2}
    grpo(grpo_of(files, output_dir=tmp_path / "out", reward=f"{files / 'prm'}:dense", **changes))
    rewards = [line["rewards/prm_dense/mean"] for line in read_lines(tmp_path / "out" / "metrics.jsonl")]
    assert statistics.fmean(rewards[-5:]) > statistics.fmean(rewards[:5]) + 0.1


# ---- what does not go together ----


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level 'sequence' judges a completion as one"),
        ({"loss_type": "gmpo"}, "loss_type 'gmpo' judges a completion as one, and reward 'prm_dense' its steps"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "leave out multi_objective_aggregation"),
    ],
)
def test_what_judges_completions_as_one_is_refused(files: Path, tmp_path: Path, change: dict[str, str], said: str):
    with pytest.raises(ValueError, match=said):
        grpo(grpo_of(files, output_dir=tmp_path / "out", reward=f"{files / 'prm'}:dense", **change))
    assert not (tmp_path / "out").exists()


def test_verbs_that_want_one_number_a_completion_say_so(files: Path, tmp_path: Path):
    spec = f"{files / 'prm'}:dense"
    with pytest.raises(ValueError, match=r"gives a number to every step, by which ppo and grpo learn.*prm:last"):
        load_reward(spec)
    with pytest.raises(ValueError, match="by which ppo and grpo learn"):
        Jury.of(BestOfN(model="m", dataset="d", output_dir="o", reward=(spec,)))
    fields = {"model": "m", "dataset": f"{files}/prompts.jsonl", "reward": (spec,), "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match="by which ppo and grpo learn"):
        rloo(Rloo(**fields))
    assert not OnlineDpo.rewards_steps and isinstance(load_reward(spec, of_steps=True).function, StepRewards)
    with pytest.raises(ValueError, match=r"does not score steps: it has no prm\.json"):
        load_reward(f"{files / 'model'}:dense", of_steps=True)


def test_two_models_of_one_name_are_refused_and_weights_stay_with_their_rewards(files: Path):
    judges = [Reward(name, step_rewards(files / "prm", "dense")) for name in ("a", "b")]
    whole, weights, dense = parted([judges[0], Reward("f", len), judges[1]], (1.0, 2.0, 3.0))
    assert ([one.name for one in whole], weights) == (["f"], [2.0])
    assert [(one.name, one.weight) for one in dense] == [("a", 1.0), ("b", 3.0)]
    with pytest.raises(ValueError, match="two models of steps one name, got a, a"):
        parted([judges[0], judges[0]], None)
