"""How long sequences are: percentiles, and a histogram of text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

SHARES = (50, 90, 99)
EIGHTHS = " ▏▎▍▌▋▊▉█"


def percentile(lengths: Sequence[int], share: int) -> int:
    """The least length that at least `share` percent of the sequences do not exceed."""
    ranked = sorted(lengths)
    return ranked[max(0, -(-len(ranked) * share // 100) - 1)]


def percentiles(lengths: Sequence[int]) -> str:
    """The middle, the tail and the end."""
    shares = ", ".join(f"{share} % up to {percentile(lengths, share)}" for share in SHARES)
    return f"{shares}, longest {max(lengths)} tokens"


def edges(longest: int, bins: int) -> list[int]:
    """The upper ends of at most `bins` bins, 1, 2 or 5 times a power of ten wide, that hold 1 to `longest`."""
    widths = (digit * 10**power for power in range(len(str(longest)) + 1) for digit in (1, 2, 5))
    width = next(width for width in widths if width * bins >= longest)
    return list(range(width, longest + width, width))


def bar(share: float, width: int) -> str:
    """A bar of this share of the width, to an eighth of a character."""
    eighths = round(share * width * 8)
    return EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def histogram(lengths: Sequence[int], bins: int = 8, width: int = 48) -> list[str]:
    """A line for each range of lengths, from that of the shortest on."""
    ends = edges(max(lengths), bins)
    ranges = [(start + 1, end) for start, end in pairwise([0, *ends]) if end >= min(lengths)]
    counts = [sum(first <= length <= last for length in lengths) for first, last in ranges]
    digits, places = len(str(ends[-1])), len(str(max(counts)))
    return [
        f"{first:>{digits}} - {last:>{digits}}  {count:>{places}}  {bar(count / max(counts), width)}".rstrip()
        for (first, last), count in zip(ranges, counts, strict=True)
    ]
