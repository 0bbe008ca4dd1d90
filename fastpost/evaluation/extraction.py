"""What of an answer votes: two that say the same in other words must vote for one thing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from fastpost.rewards import load_reward
from fastpost.rewards.builtin import last_number

Extract = Callable[[str], Hashable | None]  # the text of an answer -> what it votes for; None: nothing


def whole_text(text: str) -> str | None:
    return text.strip() or None


NAMED: dict[str, Extract] = {"number": last_number, "text": whole_text}
OF_REWARD = {"number_match": "number"}  # as the verifier reads an answer; the others compare texts


def extraction(spec: str, rewards: Sequence[str]) -> Extract:
    """`number`, `text`, `file.py:function`, or `auto`: as the first reward reads answers."""
    if spec == "auto":
        spec = OF_REWARD.get(rewards[0], "text") if rewards else "text"
    if spec in NAMED:
        return NAMED[spec]
    if ":" not in spec:
        raise ValueError(f"answer must be auto, {', '.join(NAMED)} or file.py:function, got {spec!r}")
    return load_reward(spec).function
