"""Reward functions: the built-in verifiers, a user's own, and how both are called and checked."""

from fastpost.rewards.score import Reward, Scores, load_reward, score

__all__ = ["Reward", "Scores", "load_reward", "score"]
