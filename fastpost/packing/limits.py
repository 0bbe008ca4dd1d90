"""What can be packed: rows of at least a token, within the model's window, in units that a pack can hold."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    max_tokens: int  # of a pack
    unit: int = 1  # adjacent rows that are never split
    max_length: int | None = None  # of a row: the positions that the model has

    def __post_init__(self):
        for name in ("max_tokens", "unit", "max_length"):
            value = getattr(self, name)
            if value is not None or name != "max_length":
                object.__setattr__(self, name, _counted(name, value))

    def keep(self, lengths: Sequence[int], sizes: Sequence[int]) -> bool:
        """Whether no row and no unit has a fault: all of them at once, since a plan may hold millions."""
        longest = self.max_tokens if self.max_length is None else self.max_length
        return not lengths or (min(lengths) > 0 and max(lengths) <= longest and max(sizes) <= self.max_tokens)

    def fault(self, lengths: Sequence[int], first: int) -> str | None:
        """What keeps the unit of these lengths, which begins with row `first`, out of every pack."""
        for row, length in enumerate(lengths, first):
            if length < 1:
                return f"row {row} has {length} tokens: a row must have at least one"
            if self.max_length is not None and length > self.max_length:
                return f"row {row} has {length} tokens, more than max_length {self.max_length}: truncate or drop it"
        if (total := sum(lengths)) > self.max_tokens:
            last = first + len(lengths) - 1
            what = f"row {first} has" if last == first else f"rows {first}..{last}, which are never split, have"
            return f"{what} {total} tokens, more than the {self.max_tokens} of a pack: raise max_tokens or shorten them"
        return None

    def dropped(self, faults: int, first: str) -> str:
        """What to say of units that were left out."""
        rows = "rows" if self.unit == 1 else f"units of {self.unit} rows"
        return f"{rows} dropped: {faults}; the first: {first}"


def _counted(name: str, value: Any) -> int:
    """Python's own number for any library's. True, which Python takes for 1, is more likely a slip."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a whole number above 0, got {value!r}")
    return number
