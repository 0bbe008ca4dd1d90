"""Which answers of a group are trained on: the best, the best so many, or all above a threshold."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter

from fastpost.stages.groups import Answer, judged


def selected(
    answers: Iterable[Answer],
    count: int | None,  # None: all that are good enough
    threshold: float | None,  # the least reward that is; None: any
    deduplicate: bool,  # a text that was given several times counts once
) -> list[Answer]:
    """The best first, of equals the earlier. One that was cut off would teach to end there, so it is not among them."""
    ranked = sorted(judged(answer for answer in answers if answer.finished), key=itemgetter(0), reverse=True)
    good = [answer for reward, answer in ranked if threshold is None or reward >= threshold]
    if deduplicate:
        first: dict[str, Answer] = {}
        for answer in good:
            first.setdefault(answer.text, answer)
        good = list(first.values())
    return good[:count]
