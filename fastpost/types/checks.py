"""What the checks of all types share."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import Tensor


def nearest(name: str, known: Sequence[str]) -> str:
    """ " (did you mean 'beta'?)", or nothing: the tail of every message about an unknown name."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_tensor(name: str, value: object) -> None:
    """ValueError unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
