"""The language-model head, measured: `python benchmarks/head.py`. How, is said in contest.py."""

from __future__ import annotations

import sys

from cases import CASES
from contest import Contest, main
from peers import PEERS

HEAD = Contest(
    name="head",
    about="The language-model head",
    cases=CASES,
    peers=PEERS,
    shapes={"cpu": (1024, 1024, 131072), "cuda": (8192, 4096, 131072)},
    repeats={"cpu": 5, "cuda": 20},
    quick=(256, 512, 32768),
)

if __name__ == "__main__":
    sys.exit(main(HEAD))
