"""The language-model head, measured: `python benchmarks/head.py`, on a CPU or a GPU, with every peer that is installed.

First every result is held against float64, by the rule in cases.py. If one of fastpost's is past its bound, that is all
that is printed, with exit code 1; a peer's is listed as WRONG, with its error, no speed. Then all are timed, in turns.

  x floor   time over that of as many plain products (hidden @ weight.T, in the same rounds) as the case needs at least
  x naive   time over that of plain torch
  TFLOP/s   those products, 2 T D V flop each, over the time
  peak      above inputs and returned gradients

One JSON line a measurement is appended to --output; tables.py makes the README's tables of them.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from cases import CASES, SEQUENCES, Case, Inputs, Judge, make_inputs
from harness import interleaved, machine, peak_bytes, plain_product, version
from measurement import Measurement, Setup, append
from peers import PEERS, Peer, run
from report import show

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = {"cpu": (1024, 1024, 131072), "cuda": (8192, 4096, 131072)}  # T, D, V
QUICK = (256, 512, 32768)
PRODUCT, NAIVE = "one plain product", "naive torch"


@dataclass(frozen=True)
class Checked:
    """A peer on a case, before it is timed."""

    case: Case
    peer: Peer
    status: Literal["ok", "WRONG", "failed", "absent"]
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None


def check(case: Case, peer: Peer, judge: Judge, x: Inputs) -> Checked:
    """One run for the result and to warm up, one for its memory."""
    device = x.hidden.device
    if (reason := peer.absent(device)) is not None:
        return Checked(case, peer, "absent", reason)
    once = partial(run, case, peer.runs[case.name], x)
    try:
        errors, complaints = judge.verdict(once(), x.sampled, peer.ours)
        if complaints:
            return Checked(case, peer, "WRONG", "; ".join(complaints), errors)
        peak = peak_bytes(once, lambda outcome: (outcome.dhidden, outcome.dweight), device)
        return Checked(case, peer, "ok", "", errors, peak)
    except Exception as error:  # out of memory, or a kernel that does not take this device or these shapes
        if peer.ours:
            raise
        return Checked(case, peer, "failed", f"{type(error).__name__}: {error}".splitlines()[0])


def check_all(x: Inputs, cases: Sequence[Case], peers: Sequence[Peer]) -> dict[Case, list[Checked]]:
    """Raises ArithmeticError if a result of fastpost's is past its bound."""
    checked: dict[Case, list[Checked]] = {}
    for case in cases:
        inputs = x.trained(case.trained)
        judge = Judge.of(case, inputs)
        checked[case] = [check(case, peer, judge, inputs) for peer in peers if case.name in peer.runs]
        gc.collect()
        _say(f"checked {case.title}: " + ", ".join(f"{c.peer.name} {c.status}" for c in checked[case]))
    wrong = [c for each in checked.values() for c in each if c.peer.ours and c.status == "WRONG"]
    if wrong:
        raise ArithmeticError("\n".join(f"{c.peer.name}, {c.case.title}: {c.reason}" for c in wrong))
    return checked


def time_case(case: Case, checked: Sequence[Checked], x: Inputs, setup: Setup) -> list[Measurement]:
    inputs = x.trained(case.trained)
    runs = {c.peer.name: partial(run, case, c.peer.runs[case.name], inputs) for c in checked if c.status == "ok"}
    floor = {PRODUCT: plain_product(inputs.hidden, inputs.weight)}
    seconds = interleaved(runs | floor, setup.repeats, inputs.hidden.device)
    _say(f"timed {case.title}")
    return [
        Measurement(
            setup=setup,
            case=case.title,
            products=case.products,
            provider=c.peer.name,
            package=c.peer.package,
            version=version(c.peer.package),
            settings=c.peer.settings,
            status=c.status,
            reason=c.reason,
            errors=c.errors,
            seconds=seconds.get(c.peer.name),
            product_seconds=seconds[PRODUCT],
            naive_seconds=seconds.get(NAIVE),
            peak_bytes=c.peak_bytes,
        )
        for c in checked
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time, memory and error of the head: fastpost, its peers, the floor.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, help="T; 1024 on a CPU, 8192 on a GPU")
    parser.add_argument("--hidden", type=int, help="D; 1024 on a CPU, 4096 on a GPU")
    parser.add_argument("--vocab", type=int, help="V; 131072")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, help="timed rounds; 5 on a CPU, 20 on a GPU")
    parser.add_argument("--quick", action="store_true", help="T, D, V = {}, {}, {} and 3 rounds".format(*QUICK))
    parser.add_argument("--cases", nargs="+", choices=sorted({c.name for c in CASES}), help="only these")
    parser.add_argument("--providers", nargs="+", choices=[p.name for p in PEERS], help="only these")
    parser.add_argument("--output", type=Path, help="JSON lines; benchmarks/results/<device>-<date>.jsonl")
    options = parser.parse_args(argv)
    for name, default in zip(
        ("tokens", "hidden", "vocab"), QUICK if options.quick else SHAPES[options.device], strict=True
    ):
        setattr(options, name, getattr(options, name) or default)
    options.repeats = options.repeats or (3 if options.quick else {"cpu": 5, "cuda": 20}[options.device])
    if options.tokens % SEQUENCES:
        parser.error(f"--tokens must be a multiple of {SEQUENCES}, the sequences in it, got {options.tokens}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    device, now = torch.device(options.device), datetime.datetime.now().astimezone()
    shape = (options.tokens, options.hidden, options.vocab)
    setup = Setup(machine(device), now.isoformat(timespec="seconds"), options.dtype, *shape, options.repeats)
    cases = [case for case in CASES if not options.cases or case.name in options.cases]
    peers = [peer for peer in PEERS if not options.providers or peer.name in options.providers]
    x = make_inputs(*shape, getattr(torch, options.dtype), device)
    try:
        checked = check_all(x, cases, peers)
    except ArithmeticError as error:
        _say(f"fastpost is wrong, so nothing was timed\n{error}")
        return 1
    measurements = [m for case in cases for m in time_case(case, checked[case], x, setup)]
    slug = "cpu" if device.type == "cpu" else re.sub(r"\W+", "-", setup.machine.name).strip("-").lower()
    output = options.output or RESULTS / f"{slug}-{now:%Y-%m-%d}.jsonl"
    append(output, measurements)
    show(measurements)
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
