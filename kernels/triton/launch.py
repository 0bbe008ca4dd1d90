"""Shapes of the launches: what a program takes at a time, and with how many warps and stages.

Every entry compiles without a spill and within shared memory for the GPUs it is for (tests/test_triton_compile.py).
None has been timed on a GPU yet; `benchmarks/rows.py` does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Row(NamedTuple):
    BV: int  # columns of a program
    num_warps: int


class Product(NamedTuple):
    BM: int  # rows of hidden
    BN: int  # rows of the weight, which are columns of the logits
    BK: int
    num_warps: int
    num_stages: int
    GROUP: int = 16  # row blocks that go through the same columns together, so that L2 serves the weight to all


# 16 numbers a thread in a fold: four 16-byte loads in flight, and the rows of policy and reference fit the registers.
ROWS = {"fold": Row(8192, 16), "mixture": Row(2048, 8), "grads": Row(2048, 8)}

# By what a program has to hold: one set of logits as they come out of the product ("plain"), shaped by a bias or a cap
# ("one"), with the reference's or those at temperature 1 beside them ("two"), or fp32 operands. On gfx942 "two" spilled
# scalar registers at each of eight sizes, and is left to the row kernels.
FORWARD = {
    "sm_80": {
        "plain": Product(128, 128, 64, 8, 3),
        "one": Product(128, 128, 64, 8, 3),
        "two": Product(64, 64, 64, 8, 3),
        "fp32": Product(64, 32, 16, 8, 2),
    },
    "sm_89": {
        "plain": Product(128, 128, 32, 8, 3),
        "one": Product(128, 128, 32, 8, 3),
        "two": Product(64, 64, 32, 8, 3),
        "fp32": Product(64, 32, 16, 8, 2),
    },
    "sm_90": {
        "plain": Product(128, 256, 64, 8, 4),
        "one": Product(128, 128, 64, 8, 4),
        "two": Product(128, 64, 64, 8, 4),
        "fp32": Product(64, 32, 16, 8, 2),
    },
    "sm_100": {
        "plain": Product(128, 128, 64, 8, 4),
        "one": Product(128, 128, 64, 8, 4),
        "two": Product(128, 64, 64, 8, 4),
        "fp32": Product(64, 32, 16, 8, 2),
    },
    "gfx942": {
        "plain": Product(128, 128, 64, 8, 2),
        "one": Product(128, 128, 64, 8, 2),
        "fp32": Product(64, 32, 16, 8, 2),
    },
}
COPY_ENGINE = {"sm_90", "sm_100"}
SMALL = "sm_89"  # 100 KB of shared memory and mma.sync: also what any other GPU can run


def architecture(device: torch.device) -> str:
    """The key of FORWARD for a device."""
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get((major, minor), SMALL)
