"""RLOO and REINFORCE++ against their papers' equations; the family of GRPO; exact resume; and that they learn."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import tiny
from fastpost.data import Prompt
from fastpost.models.loading import attend_packed
from fastpost.packing.subsets import with_known
from fastpost.rewards import Scores
from fastpost.rollout import Completion
from fastpost.rollout.sampler import Generate
from fastpost.trainers import grpo as grpo_module
from fastpost.trainers import policy, task
from fastpost.trainers.config import Grpo, Reinforce, Rloo
from fastpost.trainers.episodes import episodes, packs_of
from fastpost.trainers.grpo import grpo
from fastpost.trainers.log import read_lines
from fastpost.trainers.objectives import of_grpo, of_reinforce, of_rloo
from fastpost.trainers.reinforce import advantages_of as of_reinforce_advantages
from fastpost.trainers.reinforce import reinforce
from fastpost.trainers.rloo import advantages_of as of_rloo_advantages
from fastpost.trainers.rloo import rloo
from fastpost.trainers.rollouts import Rollouts, joined, only_groups
from rules import assert_gradient_close_to_truth
from timeless import timeless

LENGTHS = (3, 5, 2, 4)
REWARDS = (1.0, -0.5, 0.3, 2.0)
VERBS: dict[str, tuple[Callable[..., Any], type]] = {
    "grpo": (grpo, Grpo),
    "rloo": (rloo, Rloo),
    "reinforce": (reinforce, Reinforce),
}


def config_of(kind: type, **changes) -> Any:
    fields = {
        "model": "m",
        "dataset": "d",
        "output_dir": "o",
        "reward": "number_match",
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }
    return kind(**(fields | changes))


def rollouts_of(rewards: tuple[float, ...] = REWARDS) -> Rollouts:
    draw = torch.Generator().manual_seed(2)
    ids = lambda n: torch.randint(5, 97, (n,), generator=draw).tolist()  # noqa: E731
    prompts = [Prompt("p", ids(4), {})] * 2 + [Prompt("q", ids(2), {})] * 2
    completions = [Completion(ids(n), finished=n != 5, logp=[-1.0] * n) for n in LENGTHS]
    scores = Scores(torch.tensor(rewards), {"f": torch.tensor(rewards)}, {})
    return Rollouts(prompts, completions, [f"text {i}" for i in range(4)], scores, {"step_time/rollout": 1.0})


def known(config: Any) -> tuple[Rollouts, Any, list[Tensor], list[Tensor]]:
    """Rollouts, their episodes with log-probabilities made up, and those, a tensor a completion."""
    rollouts, draw = rollouts_of(), torch.Generator().manual_seed(5)
    whole = episodes(rollouts, config)
    old, ref = (-torch.rand(whole.num_tokens, generator=draw) for _ in range(2))
    whole = with_known(whole, old_logp=old, ref_logp=ref)
    parts = [x[whole.batch.kept].double().split(list(LENGTHS)) for x in (old, ref)]
    return rollouts, whole, list(parts[0]), list(parts[1])


def of_tokens(whole: Any, x: Tensor) -> list[Tensor]:
    return list(x[whole.batch.kept].double().split(list(LENGTHS)))


# ---- advantages ----


@pytest.mark.parametrize("normalize", [False, True])
def test_rloo_compares_with_the_others_of_its_group(normalize: bool):
    config = config_of(Rloo, beta=0.2, normalize_advantages=normalize, reward_clip_range=(-0.25, 1.5))
    rollouts, whole, old, ref = known(config)
    clipped = [min(1.5, max(-0.25, reward)) for reward in REWARDS]
    paid = [r - 0.2 * float((a - b).sum()) for r, a, b in zip(clipped, old, ref, strict=True)]
    truth = torch.tensor([paid[0] - paid[1], paid[1] - paid[0], paid[2] - paid[3], paid[3] - paid[2]])
    if normalize:
        truth = (truth - truth.mean()) / (truth.std() + 1e-4)
    torch.testing.assert_close(of_rloo_advantages(rollouts, whole, config), truth)


@pytest.mark.parametrize("kind", ["reinforce_plus_plus", "reinforce_plus_plus_baseline", "reinforce"])
def test_reinforce_goes_by_what_is_still_to_come(kind: str):
    config = config_of(Reinforce, advantage=kind, kl_coef=0.2, gamma=0.9)
    rollouts, whole, old, ref = known(config)
    if kind == "reinforce_plus_plus_baseline":
        paid = torch.tensor([r - 0.2 * float((a - b).sum()) for r, a, b in zip(REWARDS, old, ref, strict=True)])
        centred = (paid.view(2, 2) - paid.view(2, 2).mean(1, keepdim=True)).view(4)
        truth = [(x / (centred.square().sum() / 3).sqrt()).expand(n) for x, n in zip(centred, LENGTHS, strict=True)]
        slack = {"rtol": 1e-3, "atol": 1e-3}  # the 1e-4 beside the deviation
    else:
        truth, slack = [], {}
        for r, a, b in zip(REWARDS, old, ref, strict=True):
            rewards = -0.2 * (a - b)
            rewards[-1] += r
            n = len(rewards)
            truth.append(torch.stack([sum(0.9 ** (i - t) * rewards[i] for i in range(t, n)) for t in range(n)]))
        if kind == "reinforce_plus_plus":
            flat = torch.cat(truth)
            truth = [(x - flat.mean()) / flat.var().sqrt() for x in truth]
    found = of_tokens(whole, of_reinforce_advantages(rollouts, whole, config))
    torch.testing.assert_close(torch.cat(found).float(), torch.cat(truth).float(), **slack)


# ---- gradients ----


def logps(model: Any, rollouts: Rollouts) -> list[Tensor]:
    found = []
    for prompt, completion in zip(rollouts.prompts, rollouts.completions, strict=True):
        ids = torch.tensor(prompt.input_ids + completion.ids)
        at = torch.arange(len(prompt.input_ids) - 1, len(ids) - 1)
        found.append(model(input_ids=ids[None]).logits[0].log_softmax(-1)[at, ids[at + 1]])
    return found


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("verb", ["rloo", "reinforce"])
def test_the_first_update_is_the_policy_gradient(verb: str, shared: bool):
    """-sum_t A_t dlogp_t, over sequences or over tokens: the ratio is 1."""
    config = config_of(VERBS[verb][1], per_device_train_batch_size=2, gradient_accumulation_steps=2)
    objective = {"rloo": of_rloo, "reinforce": of_reinforce}[verb](config)
    rollouts, whole, _, _ = known(config)
    advantage = torch.tensor([0.7, -0.3, 1.1, -1.9])
    whole = with_known(whole, advantage=whole.batch.spread(advantage), old_logp=None, ref_logp=None)
    model = tiny.model("qwen3").train()
    attend_packed(model)
    stage: Any = SimpleNamespace(shared=shared, config=config, model=model)
    packs = packs_of(whole, objective, stage, rollouts)
    policy.backward(model, packs, objective, sum(LENGTHS), config)
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])

    def truth(dtype: torch.dtype) -> Tensor:
        model = tiny.model("qwen3").to(dtype)
        each = [-(a * x).sum() for a, x in zip(advantage.to(dtype), logps(model, rollouts), strict=True)]
        total = torch.stack(each).sum() / (4 if verb == "rloo" else sum(LENGTHS))
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])

    assert_gradient_close_to_truth(ours, truth(torch.float32), truth(torch.float64))


def test_a_loss_of_the_family_has_its_own_knobs_and_the_configs():
    knobs = of_grpo(config_of(Grpo, importance_sampling_level="sequence", loss_type="grpo")).loss.knobs
    assert knobs["epsilon"] == 3e-4  # gspo's own
    knobs = of_grpo(config_of(Grpo, epsilon=0.1, epsilon_high=0.3, delta=2.0, entropy_coef=0.01)).loss.knobs
    assert (knobs["epsilon"], knobs["epsilon_high"], knobs["delta"], knobs["entropy_coef"]) == (0.1, 0.3, 2.0, 0.01)
    assert of_grpo(config_of(Grpo, loss_type="cispo")).loss.knobs["epsilon_high"] == 5.0
    assert of_rloo(config_of(Rloo, beta=0.3)).loss.knobs["beta"] == 0  # it is in the reward


# ---- sets of rollouts ----


def test_groups_are_taken_out_and_put_together():
    rollouts = rollouts_of()
    parts = [only_groups(rollouts, 2, [group]) for group in (1, 0)]
    assert parts[0].texts == ["text 2", "text 3"] and parts[0].scores.rewards.tolist() == pytest.approx([0.3, 2.0])
    again = joined([parts[1], parts[0]])
    assert again.texts == rollouts.texts and torch.equal(again.scores.rewards, rollouts.scores.rewards)
    assert again.seconds == {"step_time/rollout": 2.0}


def test_dynamic_sampling_goes_on_until_the_step_is_full(monkeypatch: pytest.MonkeyPatch):
    config = config_of(Grpo, dynamic_sampling=True, max_resamplings=3)
    one = [rollouts_of((1.0, 1.0, 0.0, 1.0)), rollouts_of((0.5, math.nan, 0.5, 0.5))]
    given = [*one, rollouts_of((0.0, 2.0, 1.0, 0.0))]
    calls = iter(given)
    monkeypatch.setattr(grpo_module, "next_rollouts", lambda run, stage, count=None: next(calls))
    found = grpo_module._sample(SimpleNamespace(each=2), SimpleNamespace(), config)  # type: ignore[arg-type]
    assert found.scores.rewards.tolist() == [0.0, 1.0, 0.0, 2.0]
    monkeypatch.setattr(grpo_module, "next_rollouts", lambda run, stage, count=None: rollouts_of((0.5,) * 4))
    assert len(grpo_module._sample(SimpleNamespace(each=2), SimpleNamespace(), config).texts) == 4  # type: ignore[arg-type]


# ---- whole runs ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    tiny.model("llama").save_pretrained(directory / "model")
    tiny.tokenizer().save_pretrained(directory / "model")
    rows = [{"prompt": f"{word} "} for word in "abcdefg"]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "rewards.py").write_text(
        "def capitals(completions, **columns):\n"
        "    return [sum('A' <= x <= 'Z' for x in text) / 6 for text in completions]\n\n\n"
        "def short(completions, **columns):\n"
        "    return [-len(text) / 6 for text in completions]\n"
    )
    return directory


@pytest.fixture
def run(files: Path, tmp_path: Path) -> Callable[..., list[dict]]:
    """Runs a verb into a directory of this name; returns its metrics."""

    def to(verb: str, name: str, **changes) -> list[dict]:
        function, kind = VERBS[verb]
        fields = {"model": files / "model", "dataset": files / "prompts.jsonl", "output_dir": tmp_path / name}
        fields |= {"reward": f"{files / 'rewards.py'}:capitals"}
        function(config_of(kind, **(fields | changes)))
        return read_lines(tmp_path / name / "metrics.jsonl")

    return to


KINDS = {
    "rloo": ("rloo", {}),
    "rloo, two iterations": ("rloo", {"num_iterations": 2, "lora_r": 2, "missing_eos_penalty": 0.5}),
    "reinforce++": ("reinforce", {"num_generations": 1, "soft_punish_cache": 3}),
    "reinforce, no reference": ("reinforce", {"kl_coef": 0.0, "advantage": "reinforce"}),
    "dapo": ("grpo", {"dynamic_sampling": True, "epsilon_high": 0.28, "soft_punish_cache": 3}),
    "dapo, by epochs": ("grpo", {"dynamic_sampling": True, "max_steps": -1, "num_train_epochs": 1.0}),
    "corrections": ("grpo", {"rollout_correction": "token_truncate", "top_entropy_quantile": 0.5, "lora_r": 2,
                             "lora_dropout": 0.1}),
    "gdpo": ("grpo", {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": (1.0, 0.5)}),
    **{name: ("grpo", {"loss_type": name, "num_iterations": 2})
       for name in ("bnpo", "cispo", "sapo", "gmpo", "luspo", "vespo")},
}  # fmt: skip


@pytest.mark.parametrize(("verb", "changes"), KINDS.values(), ids=KINDS)
def test_k_steps_and_a_resume_give_the_bits_of_the_straight_run(
    run: Callable[..., list[dict]], files: Path, tmp_path: Path, verb: str, changes: dict
):
    if "reward_weights" in changes:
        changes = changes | {"reward": [f"{files / 'rewards.py'}:{name}" for name in ("capitals", "short")]}
    straight = run(verb, "straight", **changes)
    resumed = run(verb, "resumed", resume_from_checkpoint=tmp_path / "straight" / "checkpoint-2", **changes)
    weights = "adapter_model.safetensors" if "lora_r" in changes else "model.safetensors"
    assert (tmp_path / "resumed" / weights).read_bytes() == (tmp_path / "straight" / weights).read_bytes()
    assert [*map(timeless, resumed)] == [timeless(line) for line in straight if line["step"] > 2]
    assert straight[0]["grad_norm"] > 0


@pytest.mark.parametrize("verb", ["rloo", "reinforce"])
def test_the_reward_rises(run: Callable[..., list[dict]], verb: str):
    changes = {"max_steps": 30, "per_device_train_batch_size": 24, "learning_rate": 1e-2, "logging_steps": 5}
    lines = run(verb, "out", num_generations=3, **changes)
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.2


def test_the_sampler_and_the_trainer_are_compared_at_the_first_step(run, capsys: pytest.CaptureFixture):
    run("grpo", "out", max_steps=1)
    said = capsys.readouterr().err
    assert "the sampler's log-probabilities differ from the trainer's by" in said
    run("rloo", "other", max_steps=1)
    assert "the sampler's log-probabilities differ" in capsys.readouterr().err


def test_what_a_sampler_would_not_give_again_is_replayed(
    run: Callable[..., list[dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    thrown = []

    @dataclass(frozen=True)
    class Dice(Generate):
        """Other completions at every call."""

        @property
        def reproducible(self) -> bool:
            return False

        def __call__(self, prompt_ids, sampling, num_generations=1, keys=None):
            thrown.append(1)
            return super().__call__(prompt_ids, replace(sampling, seed=len(thrown)), num_generations, keys)

    monkeypatch.setattr(task, "sampler_for", lambda backend, model, tokenizer, *_: Dice(model, tokenizer))
    run("grpo", "out", save_total_limit=2)
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")  # as if it had been killed before
    assert len(thrown) == 4
    run("grpo", "out", save_total_limit=2, resume_from_checkpoint="latest")
    assert len(thrown) == 4
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert sorted(path.name for path in (tmp_path / "out" / "rollouts").iterdir()) == ["step-2.json", "step-3.json"]
