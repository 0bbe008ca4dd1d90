"""GRPO: the gradient of a step against float64, what costs nothing, references, exact resume, and that it learns."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import tiny
from fastpost.advantages import group_centred
from fastpost.cli import main
from fastpost.data import Prompt
from fastpost.models.lora import lora_config, with_lora
from fastpost.rewards import Scores
from fastpost.rollout import Completion
from fastpost.trainers import episodes
from fastpost.trainers.config import Grpo
from fastpost.trainers.grpo import grpo
from fastpost.trainers.log import read_lines
from fastpost.trainers.reference import Reference
from fastpost.trainers.rollouts import Rollouts, first_group, rollout_metrics
from fastpost.trainers.start import Parts, Start
from policy_steps import backward, policy_packs
from rules import assert_close_to_truth, assert_gradient_close_to_truth
from timeless import timeless

LENGTHS = (3, 5, 2, 4, 6, 1)  # of the completions of two groups of three
TOKENS = sum(LENGTHS)
REWARDS = (1.0, 0.0, 0.2, 0.0, 0.0, 2.0)  # none is its group's mean


def config_of(model: Path | str = "m", out: Path | str = "o", **changes) -> Grpo:
    fields = {
        "model": model,
        "dataset": "d",
        "output_dir": out,
        "reward": "number_match",
        "num_generations": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }
    return Grpo(**(fields | changes))


def rollouts_of(rewards: tuple[float, ...] = REWARDS) -> Rollouts:
    draw = torch.Generator().manual_seed(2)
    ids = lambda n: torch.randint(5, 97, (n,), generator=draw).tolist()  # noqa: E731
    prompts = [Prompt("p", ids(4), {})] * 3 + [Prompt("q", ids(2), {})] * 3
    completions = [Completion(ids(n), finished=n != 6) for n in LENGTHS]
    scores = Scores(torch.tensor(rewards), {"f": torch.tensor(rewards)}, {})
    return Rollouts(prompts, completions, [f"text {i}" for i in range(6)], scores, {"step_time/rollout": 1.0})


def logps(model: nn.Module, rollouts: Rollouts, temperature: float) -> list[Tensor]:
    """logp of every completion's tokens, by Hugging Face's own logits, one sequence at a time."""
    found = []
    for prompt, completion in zip(rollouts.prompts, rollouts.completions, strict=True):
        ids = torch.tensor(prompt.input_ids + completion.ids)
        logp = (model(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)
        at = torch.arange(len(prompt.input_ids) - 1, len(ids) - 1)
        found.append(logp[at, ids[at + 1]])
    return found


def both(model: nn.Module) -> Iterator[nn.Module]:
    """As it is, and in float64."""
    yield from (copy.deepcopy(model).to(dtype) for dtype in (torch.float32, torch.float64))


def plain_gradient(model: nn.Module, rollouts: Rollouts, advantages: Tensor, config: Grpo) -> Tensor:
    """On the policy that sampled, the ratio is 1 and its gradient that of logp: -A dlogp, in each normalisation."""
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    S, N = len(LENGTHS), sum(LENGTHS)
    for logp, advantage, n in zip(
        logps(model, rollouts, config.temperature), advantages.double(), LENGTHS, strict=True
    ):
        ratio = (logp - logp.detach()).exp()
        if config.importance_sampling_level == "sequence":
            ratio = ratio.log().mean().exp().expand(n)
        each = {"dapo": 1 / N, "grpo": 1 / (S * n), "dr_grpo": 1 / (S * config.max_completion_length)}
        total = total - (advantage.to(total) * ratio).sum() * each[config.loss_type]
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_a_step_has_the_gradient_of_the_whole_window(loss_type: str, level: str):
    config = config_of(loss_type=loss_type, importance_sampling_level=level, temperature=0.7)
    rollouts = rollouts_of()
    advantages = group_centred(rollouts.scores.rewards, 3)
    model = tiny.model("qwen3").train()
    packs = policy_packs(rollouts, advantages, config)
    assert len(packs) == 3
    backward(model, packs, TOKENS, config)
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    same, truth = (
        plain_gradient(tiny.model("qwen3").to(dtype), rollouts, advantages, config)
        for dtype in (torch.float32, torch.float64)
    )
    assert_gradient_close_to_truth(ours, same, truth)


@pytest.mark.parametrize(("loss_type", "total"), [("dapo", 1), ("grpo", 1), ("dr_grpo", sum(LENGTHS) / (6 * 9))])
def test_weights_of_a_step_sum_to_what_its_name_says(loss_type: str, total: float):
    rollouts = rollouts_of()
    for level in ("token", "sequence"):
        config = config_of(loss_type=loss_type, importance_sampling_level=level, max_completion_length=9)
        batches = [packed.batch for packed in policy_packs(rollouts, torch.ones(6), config)]
        kept = (batch.weight[batch.kept] if level == "token" else batch.weight for batch in batches)
        assert sum(float(weight.sum()) for weight in kept) == pytest.approx(total)


def test_groups_without_variance_cost_nothing_and_stay_in_the_denominator():
    config, rollouts = config_of(), rollouts_of((1.0, 1.0, 1.0, 0.0, 0.0, 2.0))
    advantages = group_centred(rollouts.scores.rewards, 3)
    packs = policy_packs(rollouts, advantages, config)
    assert sum(packed.batch.lengths.numel() for packed in packs) == 3
    weights = torch.cat([packed.batch.weight for packed in packs])
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / sum(LENGTHS)))
    assert rollout_metrics(rollouts, 3)["frac_reward_zero_std"] == 0.5
    assert len(policy_packs(rollouts, advantages, replace(config, beta=0.1))) == 3  # the KL needs all of them
    assert policy_packs(rollouts_of((1.0,) * 6), torch.zeros(6), config) == []


def test_completions_that_did_not_end_can_be_left_out():
    rollouts = rollouts_of()
    advantages = group_centred(rollouts.scores.rewards, 3)
    packs = policy_packs(rollouts, advantages, config_of(mask_truncated_completions=True))
    kept = sum(int((packed.batch.target != -100).sum()) for packed in packs)
    assert kept == sum(LENGTHS) - 6


def test_the_second_iteration_clips_against_the_first():
    config = config_of(num_iterations=2, epsilon=0.1, epsilon_high=0.2)
    rollouts, model = rollouts_of(), tiny.model("qwen3").train()
    advantages = group_centred(rollouts.scores.rewards, 3)
    packs, first = backward(model, policy_packs(rollouts, advantages, config), TOKENS, config)
    assert (first["clip_ratio/low_mean"], first["clip_ratio/high_mean"]) == (0, 0)
    old = torch.cat([packed.batch.old_logp[packed.batch.target != -100] for packed in packs])
    assert_close_to_truth(old, *(torch.cat(logps(m, rollouts, 1.0)) for m in both(tiny.model("qwen3"))))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.3 * parameter.grad)
    _, second = backward(model, packs, TOKENS, config)
    ratios = (torch.cat(logps(model, rollouts, 1.0)).detach() - old).exp()
    spread = torch.cat([a.expand(n) for a, n in zip(advantages, LENGTHS, strict=True)])
    low, high = (ratios < 0.9) & (spread < 0), (ratios > 1.2) & (spread > 0)
    assert low.any() or high.any()
    assert second["clip_ratio/low_mean"] == pytest.approx(float(low.float().mean()))
    assert second["clip_ratio/high_mean"] == pytest.approx(float(high.float().mean()))


def test_the_reference_is_the_policy_before_training():
    config, rollouts, model = config_of(beta=0.5), rollouts_of(), tiny.model("qwen3").train()
    reference = Reference.of(Start(Parts.of(model), torch.optim.SGD(model.parameters())), config)
    advantages = group_centred(rollouts.scores.rewards, 3)
    packs = [reference.scored(packed) for packed in policy_packs(rollouts, advantages, config)]
    assert backward(model, packs, TOKENS, config)[1]["kl"] == 0
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    kl = backward(model, packs, TOKENS, config)[1]["kl"]
    models = zip(both(tiny.model("qwen3")), both(model), strict=True)
    moved = [torch.cat(logps(m, rollouts, 1.0)) - torch.cat(logps(after, rollouts, 1.0)) for m, after in models]
    assert_close_to_truth(torch.tensor(kl), *((x.exp() - 1 - x).mean() for x in moved), "kl")
    assert all(parameter.grad is None for parameter in reference.role.model.parameters())


def test_a_reference_without_the_adapter_leaves_what_trains_as_it_is():
    """PEFT's own switch would not, as its line at the end shows."""
    pytest.importorskip("peft")
    model = with_lora(tiny.model("qwen3"), lora_config(2, init_lora_weights=False)).train()
    seen = []
    trace = lambda *_: seen.append({name: (id(p), p.requires_grad) for name, p in model.named_parameters()})  # noqa: E731
    model.get_base_model().model.register_forward_hook(trace)
    config, rollouts = config_of(beta=0.5, lora_r=2), rollouts_of()
    reference = Reference.of(Start(Parts.of(model), torch.optim.SGD(model.parameters())), config)
    packs = policy_packs(rollouts, group_centred(rollouts.scores.rewards, 3), config)
    trace()
    for _ in range(2):
        packs = [reference.scored(packed) for packed in packs]
        assert model.training
        backward(model, packs, TOKENS, config)
    trace()
    assert len(seen) == 2 + 4 * 3 and all(each == seen[0] for each in seen)
    scored = torch.cat([packed.batch.ref_logp[packed.batch.kept] for packed in packs])
    assert_close_to_truth(scored, *(torch.cat(logps(m, rollouts, 1.0)) for m in both(tiny.model("qwen3"))))
    with model.disable_adapter():
        trace()
    assert seen[-1] != seen[0]


def test_metrics_and_samples_are_those_of_the_rollouts():
    values = rollout_metrics(rollouts_of(), 3)
    assert values["reward"] == pytest.approx(3.2 / 6)
    assert values["reward_std"] == pytest.approx((stdev(REWARDS[:3]) + stdev(REWARDS[3:])) / 2)
    assert values["rewards/f/mean"] == values["reward"]
    assert (values["completions/min_length"], values["completions/max_length"]) == (1, 6)
    assert values["completions/clipped_ratio"] == pytest.approx(1 / 6)
    alone = rollout_metrics(rollouts_of(), 1)
    assert alone["reward_std"] == pytest.approx(stdev(REWARDS)) and "frac_reward_zero_std" not in alone
    some = rollout_metrics(rollouts_of((math.nan, math.nan, math.nan, 1.0, math.nan, 1.0)), 3)
    assert some["frac_reward_zero_std"] == 1.0
    samples = list(first_group(rollouts_of(), 3, step=7))
    assert [sample["reward"] for sample in samples] == pytest.approx([1.0, 0.0, 0.2])
    assert samples[1] == {"step": 7, "prompt": "p", "completion": "text 1", "reward": 0.0, "rewards/f": 0.0}


# ---- whole runs ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory, prompts, and reward functions of a user's own."""
    directory = tmp_path_factory.mktemp("files")
    tiny.model("llama").save_pretrained(directory / "model")
    tiny.tokenizer().save_pretrained(directory / "model")
    rows = [{"prompt": f"{word} ", "answer": 3} for word in "abcdefg"]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "chat.jsonl").write_text('{"prompt": [{"role": "user", "content": "hi"}]}\n')
    (directory / "rewards.py").write_text(
        "def capitals(completions, **columns):\n"
        "    texts = [c if isinstance(c, str) else c[0]['content'] for c in completions]\n"
        "    return [sum('A' <= x <= 'Z' for x in text) / 6 for text in texts]\n\n\n"
        "def broken(completions, **columns):\n"
        "    return [float('nan')] * len(completions)\n"
    )
    return directory


@pytest.fixture
def run(files: Path, tmp_path: Path) -> Callable[..., list[dict]]:
    """Runs GRPO into a directory of this name; returns its metrics."""

    def to(name: str, **changes) -> list[dict]:
        fields = {"dataset": files / "prompts.jsonl", "reward": f"{files / 'rewards.py'}:capitals"}
        grpo(config_of(**({"model": files / "model", "out": tmp_path / name} | fields | changes)))
        return read_lines(tmp_path / name / "metrics.jsonl")

    return to


def test_the_reward_rises(run: Callable[..., list[dict]]):
    lines = run("out", max_steps=30, per_device_train_batch_size=24, learning_rate=1e-2, logging_steps=5)
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.2


@pytest.mark.parametrize("share_prompts", [None, False])
def test_a_run_shares_prompts_unless_it_is_told_not_to(run, monkeypatch: pytest.MonkeyPatch, share_prompts):
    seen, plain = [], episodes.share_prompts
    monkeypatch.setattr(episodes, "share_prompts", lambda *given: seen.append(given) or plain(*given))
    run("out", max_steps=1, share_prompts=share_prompts)
    assert bool(seen) == (share_prompts is None and not torch.cuda.is_available())


EVERYTHING = {"num_iterations": 2, "beta": 0.1, "lora_r": 4, "lora_dropout": 0.2, "learning_rate": 1e-2}


@pytest.mark.parametrize(
    "changes",
    [{}, {"share_prompts": False}, {"beta": 0.1, "learning_rate": 1e-2}, EVERYTHING],
    ids=["plain", "prompts repeated", "KL to a copy", "two iterations, KL, LoRA with dropout"],
)
def test_k_steps_and_a_resume_give_the_bits_of_the_straight_run(
    run: Callable[..., list[dict]], tmp_path: Path, changes: dict
):
    straight = run("straight", **changes)
    resumed = run("resumed", resume_from_checkpoint=tmp_path / "straight" / "checkpoint-2", **changes)
    weights = "adapter_model.safetensors" if "lora_r" in changes else "model.safetensors"
    assert (tmp_path / "resumed" / weights).read_bytes() == (tmp_path / "straight" / weights).read_bytes()
    assert [*map(timeless, resumed)] == [timeless(line) for line in straight if line["step"] > 2]
    assert straight[0]["grad_norm"] > 0 and straight[-1].get("kl", 1) > 0


def test_the_reference_of_an_adapter_that_trains_on_is_this_adapter_as_it_was(
    files: Path, run: Callable[..., list[dict]], tmp_path: Path
):
    run("first", lora_r=4, learning_rate=1e-1, max_steps=1, save_steps=0)
    changes = {"model": tmp_path / "first", "beta": 0.1, "learning_rate": 1e-2}
    straight = run("second", **changes)
    assert straight[0]["kl"] == 0 and all(line["kl"] > 0 for line in straight[1:])
    resumed = run("resumed", resume_from_checkpoint=tmp_path / "second" / "checkpoint-2", **changes)
    same = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("second", "resumed")]
    assert same[0] == same[1] and resumed[-1]["kl"] == straight[-1]["kl"]


def test_conversations_are_answered_by_messages(files: Path, run: Callable[..., list[dict]], tmp_path: Path):
    run("out", dataset=files / "chat.jsonl", eval_dataset=files / "chat.jsonl", max_steps=1)
    line = read_lines(tmp_path / "out" / "metrics.jsonl")[0]
    assert {"reward", "eval_reward", "rewards/capitals/mean", "entropy", "completions/clipped_ratio"} <= line.keys()
    assert len(read_lines(tmp_path / "out" / "completions.jsonl")) == 3


def test_a_nan_from_a_reward_function_is_named_and_leaves_nothing(
    files: Path, run: Callable[..., list[dict]], tmp_path: Path
):
    with pytest.raises(ValueError, match=r"broken.*sample 0"):
        run("out", reward=f"{files / 'rewards.py'}:broken")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_when_prompts_and_completions_cannot_fit(run: Callable[..., list[dict]], tmp_path: Path):
    with pytest.raises(ValueError, match="longest prompt and max_completion_length, 8 tokens together, got 7"):
        run("out", max_tokens_per_batch=7)
    assert not (tmp_path / "out").exists()


def test_the_command_line_runs_it(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "run.yaml").write_text(
        f"model: {files / 'model'}\ndataset: {files / 'prompts.jsonl'}\nnum_generations: 4\nmax_completion_length: 4\n"
    )
    words = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    assert main(["grpo", *words, "--reward", "number_match"]) == 0
    assert read_lines(tmp_path / "out" / "metrics.jsonl")[0]["step"] == 1
    capsys.readouterr()
    assert main(["grpo", *words, "--reward", "number_mach"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    words[3] = str(tmp_path / "other")
    assert main(["grpo", *words, "--reward", "number_mach"]) == 2
    assert "number_match" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
