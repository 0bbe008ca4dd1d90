"""Reward functions: the built-in verifiers, a user's own, and how both are called and checked."""

from fastpost.rewards.load import Reward, given_reward, load_reward
from fastpost.rewards.score import Scores, score

__all__ = ["Reward", "Scores", "given_reward", "load_reward", "score"]
