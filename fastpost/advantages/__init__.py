"""From rewards to advantages, the number that multiplies each token's policy gradient: pure functions of tensors.

group        rewards of sequences, compared with those of their group
gae          rewards of tokens, along each sequence
steps        rewards of steps, at the tokens where they end
shaping      what is added to a reward for its length or its missing end
corrections  what multiplies an advantage: which tokens count, and how much

Every loss of a policy is linear in A while its sign stays, so a weight or a mask on tokens is a factor of A.
"""

from fastpost.advantages.corrections import entropy_threshold, off_policy_mask, rollout_correction, top_entropy
from fastpost.advantages.gae import gae, kl_in_reward, reinforce_plus_plus, reward_to_go, whiten
from fastpost.advantages.group import (
    group_centred,
    leave_one_out,
    normalize_then_sum,
    reinforce_plus_plus_baseline,
    sum_then_normalize,
)
from fastpost.advantages.shaping import missing_eos_penalty, soft_overlong_punishment
from fastpost.advantages.steps import on_tokens, process_supervision, steps_centred

__all__ = [
    "entropy_threshold",
    "gae",
    "group_centred",
    "kl_in_reward",
    "leave_one_out",
    "missing_eos_penalty",
    "normalize_then_sum",
    "off_policy_mask",
    "on_tokens",
    "process_supervision",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "reward_to_go",
    "rollout_correction",
    "soft_overlong_punishment",
    "steps_centred",
    "sum_then_normalize",
    "top_entropy",
    "whiten",
]
