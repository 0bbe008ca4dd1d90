"""GRPO with a group's prompt once: the step of repeated prompts, on fewer tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import decoders
import tiny
from decoders import Doubles
from fastpost.advantages import group_centred
from fastpost.models import attention
from fastpost.models.probe import check_sharing
from fastpost.shared_prompt import SharedPack
from fastpost.trainers.reference import Reference
from fastpost.trainers.sharing import parts_of_packs, shares_prompts
from fastpost.trainers.start import Parts, Start
from policy_steps import backward, policy_packs
from rules import assert_close_to_truth, assert_gradient_close_to_truth
from test_grpo import LENGTHS, TOKENS, config_of, plain_gradient, rollouts_of

PROMPTS = (4, 2)  # of the two groups of three
ALL = range(len(LENGTHS))


def made(family: str = "qwen3", dtype: torch.dtype = torch.float32, **changes):
    attention.register()
    model = decoders.model(family, dtype, **changes).train()
    model.set_attn_implementation(attention.NAME)
    return model


def gradient(model) -> Tensor:
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return found


def tokens_of(model, run) -> list[int]:
    """How many tokens each pass of the trunk embeds."""
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    run()
    hook.remove()
    return seen


@pytest.mark.parametrize("cap", [None, 11, 40])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_a_step_has_the_gradient_of_the_whole_window(loss_type: str, level: str, cap: int | None):
    config = config_of(loss_type=loss_type, importance_sampling_level=level, temperature=0.7, max_tokens_per_batch=cap)
    rollouts, model = rollouts_of(), tiny.model("qwen3").train()
    model.set_attn_implementation(attention.register())
    advantages = group_centred(rollouts.scores.rewards, 3)
    backward(model, policy_packs(rollouts, advantages, config, shared=True), TOKENS, config)
    same, truth = (
        plain_gradient(tiny.model("qwen3").to(dtype), rollouts, advantages, config)
        for dtype in (torch.float32, torch.float64)
    )
    assert_gradient_close_to_truth(gradient(model), same, truth)


def two_steps(shared: bool, family: str, dtype=torch.float32, **changes) -> tuple[Tensor, dict[str, list[float]]]:
    """Two iterations on the same rollouts, with a reference: their gradients, and what is logged of them."""
    config = config_of(beta=0.5, num_iterations=2, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    rollouts, model = rollouts_of(), made(family, dtype, **changes)
    reference = Reference.of(Start(Parts.of(model), torch.optim.SGD(model.parameters())), config)
    packs = policy_packs(rollouts, group_centred(rollouts.scores.rewards, 3), config, shared=shared)
    assert len(packs) == 2 and all(isinstance(packed, SharedPack) == shared for packed in packs)
    packs = [reference.scored(packed) for packed in packs]
    gradients, logged = [], {}
    for _ in range(2):
        packs, values = backward(model, packs, TOKENS, config)
        gradients.append(gradient(model))
        logged = {name: [*logged.get(name, ()), value] for name, value in values.items()}
        with torch.no_grad():
            model.lm_head.weight.mul_(1.3)
    return torch.stack(gradients), logged


@pytest.mark.parametrize(("family", "changes"), [("qwen3", {}), ("qwen3_moe", {"router_aux_loss_coef": 0.5})])
def test_ratios_the_kl_and_the_routers_loss_are_those_of_repeated_prompts(family: str, changes: dict):
    ours, same = (two_steps(shared, family, **changes) for shared in (True, False))
    with Doubles():
        truth = two_steps(False, family, torch.float64, **changes)
    assert_gradient_close_to_truth(ours[0], same[0], truth[0])
    assert ours[1].keys() == truth[1].keys() and ("aux_loss" in truth[1]) == bool(changes)
    for name, values in truth[1].items():
        if name.startswith("sampling/"):  # these rollouts come without the sampler's log-probabilities
            assert all(map(math.isnan, values + ours[1][name]))
            continue
        assert_close_to_truth(*map(torch.tensor, (ours[1][name], same[1][name])), torch.tensor(values).double(), name)
    assert truth[1]["clip_ratio/region_mean"][1] > 0 and truth[1]["kl"][1] > 0


def test_a_prompt_goes_through_the_trunk_once():
    config = config_of(per_device_train_batch_size=3, gradient_accumulation_steps=2)
    rollouts, model = rollouts_of(), made()
    advantages = group_centred(rollouts.scores.rewards, 3)

    def read(shared: bool) -> list[int]:
        packs = policy_packs(rollouts, advantages, config, shared=shared)
        return tokens_of(model, lambda: backward(model, packs, TOKENS, config))

    assert read(True) == [4 + 3 + 5 + 2, 2 + 4 + 6 + 1]
    assert read(False) == [3 * 4 + 3 + 5 + 2, 3 * 2 + 4 + 6 + 1]


def test_a_group_stays_together_where_it_fits(capsys):
    config, rollouts = config_of(max_tokens_per_batch=14), rollouts_of()
    assert parts_of_packs(ALL, rollouts, config) == [[[0, 1, 2]], [[3, 4, 5]]]
    assert parts_of_packs(ALL, rollouts, replace(config, max_tokens_per_batch=27)) == [[[0, 1, 2], [3, 4, 5]]]
    assert parts_of_packs([0, 2, 4], rollouts, config) == [[[0, 2]], [[4]]]
    by_rows = replace(config, max_tokens_per_batch=None)
    assert parts_of_packs(ALL, rollouts, replace(by_rows, per_device_train_batch_size=6)) == [[[0, 1, 2], [3, 4, 5]]]
    assert parts_of_packs([], rollouts, config) == []
    assert capsys.readouterr().err == ""


def test_a_group_that_does_not_fit_is_cut_and_that_is_said(capsys):
    config, rollouts = config_of(max_tokens_per_batch=11), rollouts_of()
    packs = parts_of_packs(ALL, rollouts, config)
    assert sorted(i for parts in packs for part in parts for i in part) == list(ALL)
    sizes = [sum(PROMPTS[part[0] // 3] + sum(LENGTHS[i] for i in part) for part in parts) for parts in packs]
    assert all(len({i // 3 for i in part}) == 1 for parts in packs for part in parts) and max(sizes) <= 11
    said = "2 prompts are read once more: with all 3 completions they are more than max_tokens_per_batch 11"
    assert said in capsys.readouterr().err
    rows = config_of(per_device_train_batch_size=2)
    assert sorted(map(len, parts_of_packs(ALL, rollouts, rows))) == [1, 1, 2]
    assert capsys.readouterr().err == ""


def test_prompts_are_shared_where_attention_can():
    model = made()
    assert shares_prompts(model, config_of()) is not torch.cuda.is_available()
    assert shares_prompts(model, config_of(share_prompts=True)) and model.training
    assert not shares_prompts(model, config_of(share_prompts=False))
    model.set_attn_implementation("sdpa")
    assert not shares_prompts(model, config_of())
    with pytest.raises(ValueError, match="share_prompts needs packed attention, and Qwen3ForCausalLM has 'sdpa'"):
        shares_prompts(model, config_of(share_prompts=True))


def test_a_longrope_shares_prompts_where_it_is_told_to():
    """Of a prompt's completions one may be beyond the window, and then it has another prompt than the rest."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = made("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    assert not shares_prompts(model, config_of()) and shares_prompts(model, config_of(share_prompts=True))


def test_a_model_that_does_not_see_a_shared_prompt_is_refused(monkeypatch: pytest.MonkeyPatch):
    model = made()
    check_sharing(model)
    plain = attention.Layout.of
    monkeypatch.setattr(attention.Layout, "of", lambda lengths, continues=None: plain(lengths))
    with pytest.raises(ValueError, match="Qwen3ForCausalLM does not see a shared prompt as it sees one of its own"):
        check_sharing(model)
