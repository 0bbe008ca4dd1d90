"""Advantages of sequences: by hand, against TRL's own lines, and where a group has nothing to say.

Those of tokens are in test_gae.py, their factors in test_corrections.py.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastpost.advantages import (
    group_centred,
    leave_one_out,
    missing_eos_penalty,
    normalize_then_sum,
    reinforce_plus_plus_baseline,
    soft_overlong_punishment,
    sum_then_normalize,
)
from rules import assert_close_to_truth

NAN = float("nan")
EVERY = {
    "group": group_centred,
    "batch": lambda rewards, G: group_centred(rewards, G, "batch"),
    "none": lambda rewards, G: group_centred(rewards, G, "none"),
    "leave one out": leave_one_out,
    "REINFORCE++": reinforce_plus_plus_baseline,
    "sum then normalize": lambda rewards, G: sum_then_normalize(rewards[:, None], [2.0], G),
    "normalize then sum": lambda rewards, G: normalize_then_sum(rewards[:, None], [2.0], G),
}
every = pytest.mark.parametrize("advantages", EVERY.values(), ids=EVERY.keys())


def test_by_hand():
    rewards = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 3.0])
    torch.testing.assert_close(group_centred(rewards, 3, "none"), torch.tensor([-1.0, 0, 1, -1, -1, 2]))
    std = torch.tensor([1.0, 1, 1, 3**0.5, 3**0.5, 3**0.5])
    want = torch.tensor([-1.0, 0, 1, -1, -1, 2]) / (std + 1e-4)
    torch.testing.assert_close(group_centred(rewards, 3), want)
    torch.testing.assert_close(group_centred(rewards, 3, eps=1.0), torch.tensor([-1.0, 0, 1, -1, -1, 2]) / (std + 1))
    of_all = math.sqrt(sum((r - 1.5) ** 2 for r in rewards.tolist()) / 5)
    torch.testing.assert_close(
        group_centred(rewards, 3, "batch"), torch.tensor([-1.0, 0, 1, -1, -1, 2]) / (of_all + 1e-4)
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_against_trl(scale):
    """GRPOTrainer has it inline: rewards less the group's nanmean, over nanstd + 1e-4. nanstd is TRL's own."""
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    rewards = torch.randn(8, 6)
    rewards[2, 1] = rewards[5, :2] = NAN
    std = {"group": nanstd(rewards, dim=1)[:, None], "batch": nanstd(rewards), "none": torch.tensor(1 - 1e-4)}[scale]
    want = ((rewards - rewards.nanmean(1, keepdim=True)) / (std + 1e-4)).nan_to_num(0.0)
    torch.testing.assert_close(group_centred(rewards.flatten(), 6, scale), want.flatten())


@every
@pytest.mark.parametrize("group", [[0.1] * 7, [0.1, NAN, 0.1, 0.1, 0.1, NAN, 0.1], [NAN] * 7, [NAN] * 6 + [0.3]])
def test_a_group_without_variance_is_zero_to_the_bit(group, advantages):
    """0.1 is no sum of halves: a mean of seven of them is not always 0.1."""
    rewards = torch.tensor([*group, *torch.randn(7).tolist()])
    got = advantages(rewards, 7)
    assert not got[:7].any() and got[7:].all()


@every
def test_a_sample_to_which_the_reward_does_not_apply_leaves_the_others_alone(advantages):
    with_it, without = torch.tensor([1.0, NAN, 0.0, 5.0]), torch.tensor([1.0, 0.0, 5.0])
    got = advantages(with_it, 4)
    assert got[1] == 0
    torch.testing.assert_close(got[[0, 2, 3]], advantages(without, 3))


@every
def test_groups_of_one_have_nothing_to_compare(advantages):
    assert not advantages(torch.randn(5), 1).any()


@every
def test_the_order_of_samples_and_of_groups_does_not_matter(advantages):
    rewards, within = torch.randn(6, 4, dtype=torch.float64), torch.randperm(4)
    got = advantages(rewards.flatten(), 4).view(6, 4)
    torch.testing.assert_close(advantages(rewards[:, within].flip(0).flatten(), 4).view(6, 4), got[:, within].flip(0))


@every
def test_an_infinite_reward_is_refused(advantages):
    with pytest.raises(ValueError, match=r"rewards must be finite or NaN, got -inf at index"):
        advantages(torch.tensor([0.0, 1.0, -math.inf, 2.0]), 2)


def test_leave_one_out_by_its_definition():
    rewards = torch.randn(3, 5, dtype=torch.float64)
    want = [[r - (sum(row) - r) / 4 for r in row] for row in rewards.tolist()]
    torch.testing.assert_close(leave_one_out(rewards.flatten(), 5).view(3, 5), torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("normalize", [False, True])
def test_leave_one_out_against_trl(normalize, monkeypatch):
    """RLOOTrainer._generate_and_score_completions has it inline, so its lines run as they stand."""
    lines = trl_lines("trl.trainer.rloo_trainer", "        grouped_rewards = rewards.view", "        is_std_zero")
    rewards = torch.randn(12)
    rewards[[1, 4, 5, 6]] = NAN  # of the second group one is left
    names = {
        "torch": torch,
        "nanstd": pytest.importorskip("trl.trainer.utils").nanstd,
        "rewards": rewards.clone(),
        "num_generations": 4,
        "self": SimpleNamespace(normalize_advantages=normalize),
    }
    exec(lines, names)
    ours = leave_one_out(rewards, 4)
    if normalize:
        given = ours[torch.tensor([0, 2, 3, 8, 9, 10, 11])]
        ours[torch.tensor([0, 2, 3, 8, 9, 10, 11])] = (given - given.mean()) / (given.std() + 1e-4)
    torch.testing.assert_close(ours, names["advantages"])


def test_the_baseline_form_of_reinforce_plus_plus():
    rewards = torch.randn(5, 4, dtype=torch.float64)
    centred = [[r - sum(row) / 4 for r in row] for row in rewards.tolist()]
    flat = [x for row in centred for x in row]
    mean = sum(flat) / 20
    std = math.sqrt(sum((x - mean) ** 2 for x in flat) / 19)
    want = torch.tensor([(x - mean) / (std + 1e-4) for x in flat], dtype=torch.float64)
    torch.testing.assert_close(reinforce_plus_plus_baseline(rewards.flatten(), 4), want)
    by_rewards = group_centred(rewards.flatten(), 4, "batch")
    assert not torch.allclose(by_rewards, want, rtol=1e-2)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("how", ["sum_then_normalize", "normalize_then_sum"])
def test_several_rewards_against_trl(how, scale):
    """GRPOTrainer._generate_and_score_completions has it inline, so its lines run as they stand."""
    start = '        if self.multi_objective_aggregation == "sum_then_normalize":'
    lines = trl_lines("trl.trainer.grpo_trainer", start, "        # Slice to keep only the local part")
    rewards, weights = torch.randn(12, 3), torch.tensor([1.0, 0.5, -2.0])
    rewards[1, 0] = rewards[4] = rewards[9, 1:] = NAN
    trainer = {"multi_objective_aggregation": how, "scale_rewards": scale, "reward_funcs": [0, 1, 2]}

    def theirs(dtype: torch.dtype) -> Tensor:
        names = {
            "torch": torch,
            "nanstd": pytest.importorskip("trl.trainer.utils").nanstd,
            "rewards_per_func": rewards.to(dtype, copy=True),
            "unscorable_mask": rewards.isnan().all(1),
            "num_generations": 4,
            "device": "cpu",
            "self": SimpleNamespace(reward_weights=weights.to(dtype), **trainer),
        }
        exec(lines, names)
        return names["advantages"]

    if how == "sum_then_normalize":
        ours = sum_then_normalize(rewards, weights, 4, scale)
    else:
        ours = normalize_then_sum(rewards, weights, 4)
    assert_close_to_truth(ours, theirs(torch.float32), theirs(torch.float64))


def trl_lines(module: str, start: str, stop: str) -> str:
    """The source of TRL between two of its lines, dedented."""
    import inspect
    import textwrap

    source = inspect.getsource(pytest.importorskip(module))
    assert source.count(start) == 1, f"TRL has changed: {start!r}"
    return textwrap.dedent(source[source.index(start) : source.index(stop, source.index(start))])


def test_two_mixtures_of_one_total_differ_after_gdpo():
    """The example of the paper: a plain sum gives (0, 1) and (1, 0) one advantage, whatever each reward's spread."""
    rewards = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    plain = sum_then_normalize(rewards, [1.0, 1.0], 6)
    assert plain[0] == plain[1]
    assert normalize_then_sum(rewards, [1.0, 1.0], 6)[0] > normalize_then_sum(rewards, [1.0, 1.0], 6)[1]


def test_the_end_of_a_completion():
    rewards, finished = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([True, False, False])
    torch.testing.assert_close(missing_eos_penalty(rewards, finished, 0.5), torch.tensor([1.0, 1.5, -1.5]))


@pytest.mark.parametrize("cache", [0, 1, 20, 100])
def test_the_overlong_punishment_is_trls(cache):
    punish = pytest.importorskip("trl.rewards").get_soft_overlong_punishment
    lengths = [0, 1, 79, 80, 81, 90, 99, 100, 101, 500]
    want = punish(max_completion_len=100, soft_punish_cache=cache)(completion_ids=[[0] * n for n in lengths])
    torch.testing.assert_close(soft_overlong_punishment(torch.tensor(lengths), 100, cache), torch.tensor(want).float())


def test_a_groups_advantages_add_up_to_nothing_and_ignore_shifts_and_scales():
    rewards = torch.randn(40, dtype=torch.float64)
    got = group_centred(rewards, 8, eps=0.0)
    torch.testing.assert_close(got.view(5, 8).sum(1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(got, group_centred(3 * rewards + 7, 8, eps=0.0))


BAD = [
    ({"rewards": torch.zeros(7)}, r"rewards must be \(S,\) with S a multiple of group_size 3, got \(7,\)"),
    ({"rewards": torch.zeros(2, 3)}, r"rewards must be \(S,\).*got \(2, 3\)"),
    ({"group_size": 0}, "group_size 0"),
    ({"scale": "std"}, "scale must be 'group', 'batch' or 'none', got 'std'"),
    ({"rewards": torch.tensor([0.0, 1, math.inf])}, "rewards must be finite or NaN, got inf at index 2|got inf at 2"),
    ({"rewards": torch.tensor([0, 1, 1])}, "rewards must be floating, got torch.int64"),
]


WORSE = [
    (lambda: leave_one_out(torch.zeros(7), 3), r"rewards must be \(S,\) with S a multiple of group_size 3, got \(7,\)"),
    (lambda: sum_then_normalize(torch.zeros(6), [1.0], 3), r"rewards must be \(S, F\) and weights.*got \(6,\) and 1"),
    (lambda: normalize_then_sum(torch.zeros(6, 2), [1.0], 3), r"got \(6, 2\) and 1 weights"),
    (
        lambda: sum_then_normalize(torch.tensor([[1.0, 2.0], [0.0, math.inf]]), [1.0, 1.0], 2),
        r"rewards must be finite or NaN, got inf at index \(1, 1\)",
    ),
    (lambda: missing_eos_penalty(torch.zeros(3), torch.ones(3)), "finished must be bool.*got torch.float32"),
    (lambda: missing_eos_penalty(torch.zeros(3), torch.ones(2, dtype=torch.bool)), r"shape of rewards \(3,\).*\(2,\)"),
    (
        lambda: soft_overlong_punishment(torch.ones(2), 5, 6),
        r"soft_punish_cache must be in \[0, max_.* 5\]",
    ),
]


@pytest.mark.parametrize(("call", "message"), WORSE)
def test_more_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_centred(**({"rewards": torch.zeros(6), "group_size": 3} | arguments))
