"""Group-centred advantages: by hand, against TRL's formula, and where a group has nothing to say."""

from __future__ import annotations

import math

import pytest
import torch

from fastpost.advantages import group_centred

NAN = float("nan")


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


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("group", [[0.1] * 7, [0.1, NAN, 0.1, 0.1, 0.1, NAN, 0.1], [NAN] * 7, [NAN] * 6 + [0.3]])
def test_a_group_without_variance_is_zero_to_the_bit(group, scale):
    """0.1 is no sum of halves: a mean of seven of them is not always 0.1."""
    rewards = torch.tensor([*group, *torch.randn(7).tolist()])
    got = group_centred(rewards, 7, scale)
    assert not got[:7].any() and got[7:].all()


def test_a_sample_to_which_the_reward_does_not_apply_leaves_the_others_alone():
    with_it, without = torch.tensor([1.0, NAN, 0.0, 5.0]), torch.tensor([1.0, 0.0, 5.0])
    for scale in ("group", "batch", "none"):
        got = group_centred(with_it, 4, scale)
        assert got[1] == 0
        torch.testing.assert_close(got[[0, 2, 3]], group_centred(without, 3, scale))


def test_groups_of_one_have_nothing_to_compare():
    for scale in ("group", "batch", "none"):
        assert not group_centred(torch.randn(5), 1, scale).any()


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


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_centred(**({"rewards": torch.zeros(6), "group_size": 3} | arguments))
