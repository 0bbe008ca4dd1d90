"""What of an answer votes: two that say the same in other words must vote for one thing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from fastpost.rewards.answers import chosen, last_number
from fastpost.rewards.load import user_function

Extract = Callable[[str], Hashable | None]  # the text of an answer -> what it votes for; None: nothing

BOXED = "\\boxed{"


def whole_text(text: str) -> str | None:
    return text.strip() or None


def boxed(text: str) -> str | None:
    """What is in the last \\boxed{}, without white space; else the last number. 1/2 and 0.5 have no vote in common."""
    start = text.rfind(BOXED)
    if start < 0:
        number = last_number(text)
        return None if number is None else f"{number.normalize():f}"
    depth, inside = 1, text[start + len(BOXED) :]
    for i, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return "".join(inside[:i].split()) or None
    return None


NAMED: dict[str, Extract] = {"number": last_number, "choice": chosen, "boxed": boxed, "text": whole_text}
OF_REWARD = {  # as the verifier reads an answer; the others compare texts
    "number_match": "number",
    "choice_match": "choice",
    "accuracy_reward": "boxed",
    "reasoning_accuracy_reward": "boxed",
    "cosine_scaled_reward": "boxed",
}


def extraction(spec: str, rewards: Sequence[str]) -> Extract:
    """A name, `file.py:function`, or `auto`: as the first reward reads answers."""
    if spec == "auto":
        spec = OF_REWARD.get(rewards[0], "text") if rewards else "text"
    if spec in NAMED:
        return NAMED[spec]
    if ":" not in spec:
        raise ValueError(f"answer must be auto, {', '.join(NAMED)} or file.py:function, got {spec!r}")
    return _of_user(spec)


def _of_user(spec: str) -> Extract:
    """A function of the user's, which may raise, or give what cannot be counted."""
    function = user_function(spec, "answer")

    def extract(text: str) -> Hashable | None:
        try:
            found = function(text)
            hash(found)  # votes are counted by it
        except Exception as error:
            raise ValueError(
                f"answer {spec} must give a text, a number or None, and fails for {text!r:.80}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return found

    return extract
