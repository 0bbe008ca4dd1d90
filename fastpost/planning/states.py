"""Bytes of what a run stores in another form than it computes with: 4-bit weights, and the moments of AdamW.

NF4  n / 2, and an absmax to every 64: in fp32, or in 8 bits with one more to every 256 of those, in fp32
     (arXiv:2305.14314); a tensor has 16 levels and, nested, an offset of its own besides
AdamW  two moments in the dtype of the parameter, or in fp32; in 8 bits an fp32 absmax to every 256, and tensors below
     4096 numbers in fp32 (arXiv:2110.02861)
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

SCALED_TOGETHER, NESTED_TOGETHER, LEVELS = 64, 256, 16
MAP = 4 * 256  # an fp32 table of 256 levels, which all tensors share
EIGHT_BITS_FROM = 4096
# Tensors of a parameter's size that AdamW has at once on a CPU, by the end of its name. torch's is one kernel;
# bitsandbytes' has the root of the second moment, its quotient and the gradient, and in 8 bits both moments in fp32.
TEMPORARIES = {"torch": 0, "32bit": 3, "8bit": 5}


def four_bit_bytes(sizes: Iterable[int], *, nested: bool) -> tuple[int, int]:  # numbers in each tensor
    """(packed weights, what dequantises them)."""
    sizes = list(sizes)
    scales = [_blocks(n, SCALED_TOGETHER) for n in sizes]
    state = 4 * LEVELS * len(sizes)
    if nested:
        state += sum(blocks + 4 * _blocks(blocks, NESTED_TOGETHER) + 4 for blocks in scales) + MAP * bool(sizes)
    else:
        state += 4 * sum(scales)
    return sum(_blocks(n, 2) for n in sizes), state


def adamw_bytes(parameters: Iterable[Tensor], optim: str) -> int:
    """The state that `fastpost.trainers.optimizers.adamw` comes to hold for these."""
    parameters = list(parameters)
    if optim == "adamw_torch":
        return sum(2 * p.numel() * p.itemsize + 4 for p in parameters)  # and a count of steps
    if "8bit" not in optim:
        return sum(8 * p.numel() for p in parameters)
    small = sum(8 * p.numel() for p in parameters if p.numel() < EIGHT_BITS_FROM)
    large = [p.numel() for p in parameters if p.numel() >= EIGHT_BITS_FROM]
    return small + sum(2 * (n + 4 * _blocks(n, 256)) for n in large) + 2 * MAP * bool(large)


def adamw_scratch(parameters: Iterable[Tensor], optim: str, kind: str) -> int:
    """What a step needs besides, a parameter at a time. On a GPU each is one kernel, and needs nothing."""
    if kind != "cpu":
        return 0
    copies = TEMPORARIES[next(name for name in TEMPORARIES if optim.endswith(name))]
    return copies * max((p.numel() * max(4, p.itemsize) for p in parameters), default=0)


def _blocks(n: int, each: int) -> int:
    return -(-n // each)
