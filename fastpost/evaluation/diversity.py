"""How much the answers to one prompt differ.

  distinct-n  different n-grams / all n-grams of the answers (arXiv:1510.03055); 1: no n-gram comes twice
  self-BLEU   BLEU-4 of each answer against the others as references, on average (arXiv:1802.01886); 1: all are one
  unique      different answers / all answers

n-grams are of words and marks, not of tokens, so that models with different tokenizers can be compared.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"\w+|[^\w\s]")
ORDERS = (1, 2, 3, 4)

Words = Sequence[str]


def words(text: str) -> list[str]:
    return WORD.findall(text)


def ngrams(of: Words, n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(of[i : i + n]) for i in range(len(of) - n + 1))


def distinct(answers: Sequence[Words], n: int) -> float | None:
    """None: there is no n-gram."""
    found = sum((ngrams(answer, n) for answer in answers), Counter())
    return len(found) / found.total() if found else None


def bleu(answer: Words, references: Sequence[Words]) -> float:
    """Geometric mean of clipped precisions, over the orders that the answer is long enough for, x brevity penalty
    (Papineni et al. 2002)."""
    logs = []
    for n in ORDERS:
        found, most = ngrams(answer, n), Counter()
        for reference in references:
            most |= ngrams(reference, n)
        shared = (found & most).total()
        if found and not shared:
            return 0.0
        if found:
            logs.append(math.log(shared / found.total()))
    nearest = min((len(reference) for reference in references), key=lambda r: (abs(r - len(answer)), r))
    brevity = min(0.0, 1 - nearest / len(answer)) if answer else 0.0
    return math.exp(sum(logs) / len(logs) + brevity) if logs else float(not nearest)


def self_bleu(answers: Sequence[Words]) -> float:
    """Of two answers or more."""
    scores = [bleu(answer, [*answers[:i], *answers[i + 1 :]]) for i, answer in enumerate(answers)]
    return sum(scores) / len(scores)


def unique(answers: Sequence[str]) -> float:
    return len(set(answers)) / len(answers)
