"""Losses: pure functions of statistics, one page a family. `fp.losses.<name>(stats, batch, *, knobs) -> (U,)`."""

from fastpost.losses import kl
from fastpost.losses.policy import grpo, gspo
from fastpost.losses.preference import dpo
from fastpost.losses.sft import sft

__all__ = ["dpo", "grpo", "gspo", "kl", "sft"]
