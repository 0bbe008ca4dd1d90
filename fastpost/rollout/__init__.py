"""Samples from a policy."""

from fastpost.rollout.backends import Backend, sampler_for
from fastpost.rollout.generate import generate
from fastpost.rollout.sampler import Sampler
from fastpost.rollout.sampling import Completion, Sampling

__all__ = ["Backend", "Completion", "Sampler", "Sampling", "generate", "sampler_for"]
