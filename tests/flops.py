"""Flop of the products in a call: torch's counter sees some, and not those of the native extension."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastpost.core.gemm import Packed

Side = tuple[Packed, Tensor, Tensor | None]  # as `fastpost.core.fused` has it: the second is the block's weight (B, D)


def products(function: Callable[[], Tensor | None]) -> int:
    """Of a call, and of the backward pass of what it returns."""
    with FlopCounterMode(display=False) as counter, native_products() as native:
        value = function()
        if value is not None and value.requires_grad:
            value.sum().backward()
    return counter.get_total_flops() + sum(native)


@contextlib.contextmanager
def native_products() -> Iterator[list[int]]:
    """Flop of each call of the extension that multiplies, meanwhile; none where there is no extension."""
    found: list[int] = []
    try:
        from fastpost.core import native
    except ImportError:
        yield found
        return

    def counting(count: Callable[..., int], call: Callable[..., None], *args) -> None:
        found.append(count(*args))
        call(*args)

    spies = {name: partial(counting, count, getattr(native, name)) for name, count in FLOP.items()}
    with patch.multiple(native, **spies):
        yield found


def _product(a: Tensor, b: Tensor, *_) -> int:  # (M, K), (K, N)
    return 2 * len(a) * b.numel()


def _fold_block(room, state, target, start, shape, inverse, at_1, p: Side, q: Side | None, shape_q, total, kept) -> int:
    return _tiles(len(target), p, q) + (_tiles(len(target), p) if total is not None else 0)


def _grads_block(
    room, target, start, shape, inverse, c, at_1, p: Side, q: Side | None, shape_q, beta, held: bool, dlogits, dhidden
) -> int:
    again = 0 if held else _tiles(len(target), p, q)
    return again + (_tiles(len(target), p) if dhidden is not None else 0)


def _weight_block(left: Tensor, across: Packed, dweight: Tensor, fresh: bool) -> int:  # (R, B), (B, D)
    return 2 * len(left) * dweight.numel()


def _tiles(rows: int, *sides: Side | None) -> int:
    return sum(2 * rows * side[1].numel() for side in sides if side is not None)


FLOP = {"product": _product, "fold_block": _fold_block, "grads_block": _grads_block, "weight_block": _weight_block}
