"""The verifiers that come with fastpost, by name, in the signature of a user's own: f(completions, columns..., **rest).

A completion is a text or a list of messages. The fields of a class are settings: `tag_format(tags='plan,answer')`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastpost.rewards.answers import choice_match, exact_match, number_match
from fastpost.rewards.code_tests import CodeTests
from fastpost.rewards.formats import JsonSchema, TagFormat, think_format
from fastpost.rewards.lengths import RepetitionPenalty, SoftOverlongPunishment
from fastpost.rewards.math_answers import Accuracy, CosineScaled, ReasoningAccuracy

BUILTIN: dict[str, Callable[..., Any]] = {
    "exact_match": exact_match,
    "number_match": number_match,
    "choice_match": choice_match,
    "accuracy_reward": Accuracy,
    "reasoning_accuracy_reward": ReasoningAccuracy,
    "cosine_scaled_reward": CosineScaled,
    "think_format": think_format,
    "tag_format": TagFormat,
    "json_schema": JsonSchema,
    "soft_overlong_punishment_reward": SoftOverlongPunishment,
    "repetition_penalty_reward": RepetitionPenalty,
    "code_tests": CodeTests,
}
