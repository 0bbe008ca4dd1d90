"""Reward functions: the built-in verifiers, a user's own, and how both are called and checked."""

from fastpost.rewards.load import Reward, given_reward, load_reward, load_rewards, told_apart
from fastpost.rewards.score import Scores, score

__all__ = ["Reward", "Scores", "given_reward", "load_reward", "load_rewards", "score", "told_apart"]
