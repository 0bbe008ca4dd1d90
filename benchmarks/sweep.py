"""How the cost grows: `python benchmarks/sweep.py`. What is measured, and how, is said in contest.py.

--tokens, --hidden and --vocab are the middle, from which one of T, D and V at a time goes down and up; --dtype is that
of all of these, and the middle is measured in the other, too. What a shape gave is appended to --output before the next
is begun, and a shape that the machine has no memory for is left out. plots.py draws it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import cases
import contest
import families
import peers
import torch
from cases import SEQUENCES, make_inputs
from growth import growths
from measurement import Measurement, Setup, append
from report import show_growth

FACTORS = {"tokens": (1 / 4, 1 / 2, 2, 4), "hidden": (1 / 2, 2), "vocab": (1 / 4, 1 / 2, 2, 4)}
NAMES = ("logp", "logp + entropy", "logp + reverse_kl", "dpo", "grpo", "gkd")
KNOWN = {case.name: case for case in (*families.CASES, *cases.CASES)}
RUNS = {
    "fastpost token_stats": dict.fromkeys(NAMES[:3], peers.fastpost_stats),
    "fastpost fused_loss": dict.fromkeys(NAMES, peers.fastpost_loss),
    "naive torch": dict.fromkeys(NAMES, peers.naive),
}

SWEEP = contest.Contest(
    name="sweep",
    about="How the cost of the head grows",
    cases=tuple(replace(KNOWN[name], trained=trained) for name in NAMES for trained in (False, True)),
    peers=tuple(replace(peer, runs=RUNS[peer.name]) for peer in peers.PEERS if peer.name in RUNS),
    shapes={"cpu": (512, 512, 32768), "cuda": (8192, 4096, 131072)},
    repeats={"cpu": 3, "cuda": 10},
    quick=(64, 64, 2048),
)


def setups(middle: Setup) -> Iterator[Setup]:
    yield middle
    yield replace(middle, dtype="float32" if middle.dtype == "bfloat16" else "bfloat16")
    for name, factors in FACTORS.items():
        for factor in factors:
            size = int(getattr(middle, name) * factor)
            yield replace(middle, **{name: max(SEQUENCES, size // SEQUENCES * SEQUENCES)})


def measure(setup: Setup, cases: Sequence[contest.Case], peers: Sequence[peers.Peer]) -> list[Measurement]:
    """None where the device has no memory for the inputs, or for the truth."""
    dtype, device = getattr(torch, setup.dtype), torch.device(setup.machine.device)
    try:
        x = make_inputs(setup.tokens, setup.hidden, setup.vocab, dtype, device)
        return list(contest.measure(x, cases, peers, setup))
    except torch.OutOfMemoryError as error:
        print(f"left out, {setup.title}: {error}".splitlines()[0], file=sys.stderr)
        return []


def main(argv: Sequence[str] | None = None) -> int:
    options = contest.parse(SWEEP, argv)
    middle, cases, peers, output = contest.opened(SWEEP, options)
    found: list[Measurement] = []
    for setup in setups(middle):
        print(setup.title, file=sys.stderr, flush=True)
        try:
            measured = measure(setup, cases, peers)
        except ArithmeticError as error:
            print(f"fastpost is wrong, so the sweep ends\n{error}", file=sys.stderr)
            return 1
        append(output, measured)
        found += measured
    show_growth(growths(found))
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
