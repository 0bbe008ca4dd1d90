"""Reward functions: the built-in verifiers, a user's own, and how both are called and checked."""

from fastpost.rewards.load import Reward, load_reward
from fastpost.rewards.score import Scores, score

__all__ = ["Reward", "Scores", "load_reward", "score"]
