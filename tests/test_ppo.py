"""PPO: the gradient of a minibatch against float64, roles whole and on one base, exact resume, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny
from fastpost.data import Prompt
from fastpost.models.roles import Roles
from fastpost.rewards import Scores
from fastpost.rollout import Completion
from fastpost.trainers.checkpoint import read_state
from fastpost.trainers.config import Ppo
from fastpost.trainers.episodes import episodes, microbatches, weighted, window_of
from fastpost.trainers.log import read_lines
from fastpost.trainers.loop import seed_step
from fastpost.trainers.objectives import of_ppo
from fastpost.trainers.ppo import adapted, advised, backward, known, minibatches, ppo
from fastpost.trainers.ppo_roles import cast
from fastpost.trainers.rollouts import Rollouts
from rules import assert_gradient_close_to_truth
from timeless import timeless

LENGTHS = (3, 5, 2, 4)
ONE_TURN, TURNS = ("xxx", "xxxxx", "xx", "xxxx"), ("x.x", "xx..x", "x.", ".xx.")  # . is what a tool said


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory, a reward adapter for it, a reward model of its own, and a file of prompts."""
    from peft import LoraConfig

    directory = tmp_path_factory.mktemp("files")
    tiny.model("qwen3").save_pretrained(directory / "model")
    tiny.tokenizer().save_pretrained(directory / "model")
    torch.manual_seed(3)
    roles = Roles.of(
        str(directory / "model"), policy=LoraConfig(r=2), value=LoraConfig(r=2, target_modules="all-linear")
    )
    with torch.no_grad():
        for parameter in roles.value.parameters():
            parameter.normal_(std=0.2)
    roles.save_role("value", directory / "reward")
    rows = [{"prompt": f"{a}+{b}="} for a in range(5) for b in range(4)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "rewards.py").write_text(
        "def few_tokens(completion_ids, **_):\n"
        "    return [sum(token < 16 for token in ids) / len(ids) for ids in completion_ids]\n\n\n"
        "def ones(completions, **_):\n"
        "    return [1.0] * len(completions)\n"
    )
    return directory


def config_of(files: Path, out: Path | str = "o", **changes) -> Ppo:
    fields = {
        "model": files / "model",
        "dataset": files / "prompts.jsonl",
        "output_dir": out,
        "reward": f"{files / 'rewards.py'}:few_tokens",
        "lora_r": 2,
        "per_device_train_batch_size": 4,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "max_steps": 12,
        "save_steps": 4,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "temperature": 0.9,
    }
    return Ppo(**(fields | changes))


def rollouts_of(own: tuple[str, ...] = ONE_TURN) -> Rollouts:
    draw = torch.Generator().manual_seed(2)
    ids = lambda n: torch.randint(5, 97, (n,), generator=draw).tolist()  # noqa: E731
    prompts = [Prompt("p", ids(4), {}), Prompt("q", ids(2), {}), Prompt("r", ids(3), {}), Prompt("s", ids(1), {})]
    completions = [
        Completion(ids(n), finished=n != 5, own=[mark == "x" for mark in marks])
        for n, marks in zip(LENGTHS, own, strict=True)
    ]
    rewards = torch.tensor([1.0, -0.5, 0.3, 2.0])
    return Rollouts(prompts, completions, ["t"] * 4, Scores(rewards, {"f": rewards}, {}), {"step_time/reward": 1.0})


def plain(roles: Roles, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and last hidden states of one sequence, by Hugging Face's own forward, in this role."""
    model: Any = roles[name].model
    with roles.using(name):
        out = model(input_ids=ids[None], output_hidden_states=True)
    return out.logits[0], out.hidden_states[-1][0]


def plain_loss(roles: Roles, rollouts: Rollouts, config: Ppo) -> Tensor:
    """The first update of PPO, sequence by sequence, in the papers' equations."""
    head: Any = roles.value.scalar
    logps, values, advantages, returns = [], [], [], []
    for i, (prompt, completion) in enumerate(zip(rollouts.prompts, rollouts.completions, strict=True)):
        ids = torch.tensor(prompt.input_ids + completion.ids)
        at = torch.tensor([len(prompt.input_ids) + i - 1 for i, own in enumerate(completion.mask) if own])
        logp, ref = (
            (plain(roles, name, ids)[0] / config.temperature).log_softmax(-1)[at, ids[at + 1]]
            for name in ("policy", "reference")
        )
        value = (plain(roles, "value", ids)[1] @ head.weight[0])[at]
        reward = -config.kl_coef * (logp - ref).detach()
        reward[-1] += rollouts.scores.rewards[i]
        delta = reward + config.gamma * torch.cat([value.detach()[1:], value.new_zeros(1)]) - value.detach()
        running, found = value.new_zeros(()), []
        for each in delta.flip(0):
            running = each + config.gamma * config.lam * running
            found.append(running)
        advantage = torch.stack(found).flip(0)
        for to, x in ((logps, logp), (values, value), (advantages, advantage), (returns, advantage + value.detach())):
            to.append(x)
    flat, logp, value = torch.cat(advantages), torch.cat(logps), torch.cat(values)
    white = (flat - flat.mean()) / (flat.var() + 1e-8).sqrt()
    of_value = (value - torch.cat(returns)).square().mean() / 2
    return -(white * (logp - logp.detach()).exp()).mean() + config.vf_coef * of_value


def cast_roles(config: Ppo) -> Roles:
    """With adapters that say something."""
    torch.manual_seed(0)
    roles = cast(config, {}, None).roles
    torch.manual_seed(1)
    with torch.no_grad():
        for tensors in roles.trainable().values():
            for tensor in tensors:
                tensor.normal_(std=0.05)
    return roles


def trained(roles: Roles) -> list[nn.Parameter]:
    return [p for tensors in roles.trainable().values() for p in tensors]


@pytest.mark.parametrize("own", [ONE_TURN, TURNS], ids=["one turn", "turns"])
@pytest.mark.parametrize("changes", [{}, {"value_model": "policy"}], ids=["two passes", "one pass"])
@pytest.mark.parametrize("rows", [4, 1])
def test_an_update_has_the_gradient_of_the_papers_equations(
    files: Path, rows: int, changes: dict, own: tuple[str, ...]
):
    config, rollouts = config_of(files, per_device_train_batch_size=rows, gamma=0.9, **changes), rollouts_of(own)
    roles, objective = cast_roles(config), of_ppo(config)
    whole, facts = advised(known(episodes(rollouts, config), roles, config), rollouts, config.kl_coef, config)
    packs = weighted(microbatches(whole, range(4), config), objective, window_of(whole))
    assert len(packs) == 4 // rows
    values = backward(packs, roles, objective, config)
    ours = torch.cat([p.grad.flatten() for p in trained(roles)])

    def truth(dtype: torch.dtype) -> Tensor:
        roles = cast_roles(config)
        for role in roles.by_name.values():
            role.model.to(dtype)
        assert roles.value.scalar is not None
        roles.value.scalar.to(dtype)
        gradients = torch.autograd.grad(plain_loss(roles, rollouts, config), trained(roles))
        return torch.cat([g.flatten() for g in gradients])

    assert_gradient_close_to_truth(ours, truth(torch.float32), truth(torch.float64))
    assert values["policy/clipfrac_avg"] == 0
    assert values["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert facts["objective/scores"] == pytest.approx(0.7)
    assert facts["objective/rlhf_reward"] == pytest.approx(0.7 - config.kl_coef * facts["objective/kl"])


def test_a_value_that_warms_up_learns_alone(files: Path, tmp_path: Path):
    changes = {"max_steps": 24, "save_steps": 24, "per_device_train_batch_size": 16, "learning_rate": 1e-2}
    changes |= {"reward": f"{files / 'rewards.py'}:ones", "kl_coef": 0.0, "vf_coef": 1.0, "cliprange_value": 1.0}
    config = config_of(files, tmp_path / "out", value_warmup_rounds=6, **changes)
    ppo(config)
    seed_step(config.seed, -1)  # as a run begins
    before, after = (cast(config, {}, found).roles for found in (None, tmp_path / "out" / "checkpoint-24"))
    same = {
        name: [torch.equal(a, b) for a, b in zip(tensors, after.trainable()[name], strict=True)]
        for name, tensors in before.trainable().items()
    }
    assert all(same["policy"]) and not any(same["value"])
    losses = [line["loss/value_avg"] for line in read_lines(tmp_path / "out" / "metrics.jsonl")]
    assert losses[-1] < 0.1 * losses[0]


def test_without_a_reference_the_log_says_nothing_of_it(files: Path):
    of_reference = {"objective/kl", "objective/kl_coef", "objective/non_score_reward"}
    for kl_coef, logged in ((0.05, of_reference), (0.0, set())):
        config, rollouts = config_of(files, kl_coef=kl_coef), rollouts_of()
        whole = known(episodes(rollouts, config), cast(config, {}, None).roles, config)
        assert of_reference & advised(whole, rollouts, kl_coef, config)[1].keys() == logged


def test_the_controller_goes_where_the_kl_is_not(files: Path):
    config = config_of(files, target_kl=2.0, kl_horizon=100)
    assert adapted(0.1, 2.0, 10, config) == 0.1
    assert adapted(0.1, 4.0, 10, config) == pytest.approx(0.1 * (1 + 0.2 * 10 / 100))
    assert adapted(0.1, 1.9, 10, config) == pytest.approx(0.1 * (1 - 0.05 * 10 / 100))
    assert adapted(0.1, float("nan"), 10, config) == 0.1


def test_minibatches_hold_every_row_once():
    parts = minibatches([4, 2, 0, 1, 3], 2)
    assert sorted(parts[0] + parts[1]) == [0, 1, 2, 3, 4] and {len(part) for part in parts} == {2, 3}
    assert minibatches([7], 2) == [[7], [7]]


KINDS = {
    "adapters on one base, a value of zeros": {},
    "value begins as the reward adapter, which scores": {"reward": (), "reward_model": "reward", "target_kl": 0.5},
    "function and model, the value on the policy's pass": {
        "reward_model": "reward", "value_model": "policy", "kl_estimator": "k3", "reward_weights": (1.0, 0.5),
    },
    "whole, four models": {"lora_r": 0},
    "no reference": {"kl_coef": 0.0, "whiten_rewards": True, "value_learning_rate": 1e-2},
}  # fmt: skip


def kind(files: Path, out: Path, changes: dict, **more) -> Ppo:
    named = {name: files / value if name == "reward_model" else value for name, value in changes.items()}
    return config_of(files, out, **(named | more))


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_k_rounds_and_a_resume_give_the_bits_of_the_straight_run(files: Path, tmp_path: Path, changes: dict):
    ppo(kind(files, tmp_path / "straight", changes))
    resumed = kind(
        files, tmp_path / "resumed", changes, resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4")
    )
    ppo(resumed)
    for path in sorted((tmp_path / "straight").rglob("*.safetensors")):
        relative = path.relative_to(tmp_path / "straight")
        if "checkpoint-4" not in relative.parts:
            assert (tmp_path / "resumed" / relative).read_bytes() == path.read_bytes(), relative
    straight, after = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("straight", "resumed"))
    assert [timeless(line) for line in after] == [timeless(line) for line in straight[1:]]
    states = [read_state(tmp_path / name / "checkpoint-12")[0].kept for name in ("straight", "resumed")]
    assert states[0] == states[1]
    assert (states[0]["kl_coef"] != resumed.kl_coef) == (resumed.target_kl is not None)


def test_the_reward_rises(files: Path, tmp_path: Path):
    changes = {"per_device_train_batch_size": 16, "learning_rate": 1e-2, "max_steps": 60}
    config = config_of(files, tmp_path / "out", **changes)
    ppo(config)
    lines = read_lines(tmp_path / "out" / "metrics.jsonl")
    rewards = [line["reward"] for line in lines]
    assert rewards[-1] > rewards[0] + 0.1
    sampled = [line["step"] // config.updates_per_round * config.rows_per_round for line in lines]
    assert [line["episode"] for line in lines] == sampled
    assert all(line["lr"] == line["learning_rate"] and line["eps"] > 0 for line in lines)


def test_what_a_run_leaves_loads_as_policy_and_as_value(files: Path, tmp_path: Path):
    config = config_of(files, tmp_path / "out", max_steps=4)
    ppo(config)
    roles = Roles.of(str(files / "model"), policy=str(tmp_path / "out"), value=str(tmp_path / "out" / "value"))
    again = cast(config, {}, tmp_path / "out" / "checkpoint-4").roles
    for name in ("policy", "value"):
        for a, b in zip(roles.trainable()[name], again.trainable()[name], strict=True):
            assert torch.equal(a, b)


def test_what_does_not_go_together_is_refused(files: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="value_model 'reward' begins from the reward model"):
        config_of(files, value_model="reward")
    with pytest.raises(ValueError, match="reward must name at least one function"):
        ppo(config_of(files, tmp_path / "out", reward=()))
    with pytest.raises(ValueError, match=r"max_steps must be a multiple of num_ppo_epochs x num_mini_batches 4"):
        config_of(files, max_steps=6)
    with pytest.raises(ValueError, match="reward_weights must hold one number for each of the 2 rewards, got 1"):
        ppo(kind(files, tmp_path / "out", {"reward_model": "reward"}, reward_weights=(1.0,)))
    assert not (tmp_path / "out").exists()
