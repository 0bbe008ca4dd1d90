"""What tools said is read and not learnt: gradients against float64 on plain equations, and no statistic counts it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import tiny
from fastpost.advantages import group_centred
from fastpost.data import Prompt
from fastpost.rewards import Scores
from fastpost.rollout import Completion
from fastpost.trainers.config import Grpo
from fastpost.trainers.episodes import counts, episodes
from fastpost.trainers.rollouts import Rollouts, rollout_metrics
from policy_steps import backward, policy_packs
from rules import assert_gradient_close_to_truth

# Of two groups of two: x is sampled, . is a tool's.
OWN = ("xxx..xx", "xx", "x...x.x", "xxxx..")
REWARDS = (1.0, 0.0, 0.0, 2.0)


def config_of(**changes) -> Grpo:
    fields = {
        "model": "m",
        "dataset": "d",
        "output_dir": "o",
        "reward": "number_match",
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "temperature": 0.7,
    }
    return Grpo(**(fields | changes))


def rollouts_of(seed: int = 2, own: tuple[str, ...] = OWN) -> Rollouts:
    draw = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(5, 97, (n,), generator=draw).tolist()  # noqa: E731
    prompts = [Prompt("p", ids(4), {})] * 2 + [Prompt("q", ids(2), {})] * 2
    masks = [[mark == "x" for mark in marks] for marks in own]
    completions = [
        Completion(ids(len(mask)), True, [-1.0 if o else torch.nan for o in mask], own=mask) for mask in masks
    ]
    scores = Scores(torch.tensor(REWARDS), {"f": torch.tensor(REWARDS)}, {})
    return Rollouts(prompts, completions, ["text"] * 4, scores, {"step_time/rollout": 1.0})


def own_logps(model: nn.Module, rollouts: Rollouts, temperature: float) -> list[Tensor]:
    """Of the policy's tokens alone, by Hugging Face's logits, one sequence at a time."""
    found = []
    for prompt, completion in zip(rollouts.prompts, rollouts.completions, strict=True):
        ids = torch.tensor(prompt.input_ids + completion.ids)
        logp = (model(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)
        at = torch.tensor([i + len(prompt.input_ids) - 1 for i, own in enumerate(completion.own) if own])
        found.append(logp[at, ids[at + 1]])
    return found


def plain_gradient(model: nn.Module, rollouts: Rollouts, advantages: Tensor, config: Grpo) -> Tensor:
    logps = own_logps(model, rollouts, config.temperature)
    S, N = len(logps), sum(map(len, logps))
    total = torch.zeros((), dtype=logps[0].dtype)
    for logp, advantage in zip(logps, advantages.double(), strict=True):
        ratio = (logp - logp.detach()).exp()
        if config.importance_sampling_level == "sequence":
            ratio = ratio.log().mean().exp().expand(len(logp))
        each = {"dapo": 1 / N, "grpo": 1 / (S * len(logp)), "dr_grpo": 1 / (S * config.max_completion_length)}
        total = total - (advantage.to(total) * ratio).sum() * each[config.loss_type]
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_the_gradient_of_trajectories_is_that_of_the_policys_tokens(loss_type: str, level: str, shared: bool):
    config = config_of(loss_type=loss_type, importance_sampling_level=level)
    rollouts = rollouts_of()
    advantages = group_centred(rollouts.scores.rewards, 2)
    model = tiny.model("qwen3").train()
    if shared:
        from fastpost.models.loading import attend_packed

        attend_packed(model)
    backward(model, policy_packs(rollouts, advantages, config, shared=shared), "".join(OWN).count("x"), config)
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    same, truth = (
        plain_gradient(tiny.model("qwen3").to(dtype), rollouts, advantages, config)
        for dtype in (torch.float32, torch.float64)
    )
    assert_gradient_close_to_truth(ours, same, truth)


def test_another_tool_output_changes_nothing_before_it():
    config, advantages = config_of(), torch.ones(4)
    before = rollouts_of()
    first = before.completions[0]
    said = [*first.ids[:3], *(96 - i for i in first.ids[3:5]), *first.ids[5:]]
    after = replace(before, completions=[replace(first, ids=said), *before.completions[1:]])
    logps = []
    for rollouts in (before, after):
        (packed,), _ = backward(tiny.model(), policy_packs(rollouts, advantages, config), 14, config)
        logps.append(packed.batch.old_logp[packed.batch.kept])
    earlier = OWN[0].index(".")
    assert torch.equal(logps[0][:earlier], logps[1][:earlier])
    assert not torch.equal(logps[0][earlier:5], logps[1][earlier:5])  # the policy has read it
    assert torch.equal(logps[0][5:], logps[1][5:])  # the other trajectories have not


def test_statistics_are_of_the_policys_tokens():
    rollouts, config = rollouts_of(), config_of()
    whole = episodes(rollouts, config)
    assert counts(whole).tolist() == [marks.count("x") for marks in OWN]
    assert not whole.batch.rollout_logp.isnan().any()
    metrics = rollout_metrics(rollouts, 2)
    assert metrics["completions/mean_length"] == 14 / 4
    assert metrics["completions/max_length"] == 5
    cut = [replace(completion, finished=False) for completion in rollouts.completions]
    masked = episodes(replace(rollouts, completions=cut), replace(config, mask_truncated_completions=True))
    assert counts(masked).tolist() == [0, 0, 0, 0]
