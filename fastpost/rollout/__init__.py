"""Samples from a policy."""

from fastpost.rollout.generate import Completion, Sampling, generate

__all__ = ["Completion", "Sampling", "generate"]
