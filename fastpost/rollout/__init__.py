"""Samples from a policy."""

from fastpost.rollout.generate import generate
from fastpost.rollout.sampling import Completion, Sampling

__all__ = ["Completion", "Sampling", "generate"]
