"""What the functions of this package ask of their arguments; ValueError names the argument and what it was."""

from __future__ import annotations

from torch import Tensor

from fastpost.types import IGNORE, Batch, nearest


def per_token(batch: Batch, **given: Tensor) -> None:
    """Each must be (T,)."""
    _shaped(batch, batch.target.numel(), given)


def per_sequence(batch: Batch, **given: Tensor) -> None:
    """Each must be (S,)."""
    _shaped(batch, batch.lengths.numel(), given)


def _shaped(batch: Batch, n: int, given: dict[str, Tensor]) -> None:
    for name, value in given.items():
        if value.shape != (n,):
            raise ValueError(
                f"{name} must have shape ({n},) to match {batch.target.numel()} positions in {batch.lengths.numel()} "
                f"sequences, got {tuple(value.shape)}"
            )


def finite_or_nan(name: str, value: Tensor) -> None:
    """Floating, and nowhere infinite. NaN means that the reward does not apply."""
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating, got {value.dtype}")
    infinite = value.isinf().nonzero()
    if len(infinite):
        at = tuple(infinite[0].tolist())
        raise ValueError(
            f"{name} must be finite or NaN, got {value[at].item()} at index {at[0] if len(at) == 1 else at}"
        )


def within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}{nearest(value, known)}")


def kept(batch: Batch) -> Tensor:  # (T,) bool
    """Where a token is predicted."""
    return batch.target != IGNORE
