"""How cases and contestants meet, on a CPU or a GPU, with every peer that is installed.

First every result is held against float64, by the rule in truth.py. If one of fastpost's is past its bound, that is all
that is printed, with exit code 1; a peer's is listed as WRONG, with its error, no speed. Then all are timed, in turns.

  x floor   time over that of as many plain products (hidden @ weight.T, in the same rounds) as the case needs at least
  x naive   time over that of plain torch
  x bound   time over the least for what counted.py counts: its flop at that product's rate, or its bytes at a copy's
  flop/B    those flop over the bytes that come from memory
  TFLOP/s   the products that are needed, 2 T D V flop each, over the time
  peak      above inputs and returned gradients

One JSON line a measurement is appended to --output when its case has been timed; tables.py makes the docs' tables of
them.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from cases import SEQUENCES, Case, Inputs, make_inputs
from harness import bandwidth, interleaved, machine, peak_bytes, plain_product, version
from measurement import Measurement, Setup, append
from peers import Peer, run
from report import show
from truth import Judge

RESULTS = Path(__file__).resolve().parent / "results"
PRODUCT, NAIVE = "one plain product", "naive torch"
Shape = tuple[int, int, int]  # T, D, V


@dataclass(frozen=True)
class Contest:
    """A program of this folder: what it measures, and at which shapes."""

    name: str
    about: str
    cases: Sequence[Case]
    peers: Sequence[Peer]
    shapes: Mapping[str, Shape]  # by device
    repeats: Mapping[str, int]  # timed rounds, by device
    quick: Shape


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


def measure(x: Inputs, cases: Sequence[Case], peers: Sequence[Peer], setup: Setup) -> Iterator[Measurement]:
    """All are checked before the first is timed."""
    checked = check_all(x, cases, peers)
    copied = bandwidth(setup.repeats, x.hidden.device)
    for case in cases:
        yield from time_case(case, checked[case], x, setup, copied)


def time_case(
    case: Case, checked: Sequence[Checked], x: Inputs, setup: Setup, bytes_per_second: float
) -> list[Measurement]:
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
            counted=None if c.peer.expected is None else c.peer.expected(case, inputs),
            bytes_per_second=bytes_per_second,
        )
        for c in checked
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(contest: Contest, argv: Sequence[str] | None) -> argparse.Namespace:
    on_cpu, on_gpu = contest.shapes["cpu"], contest.shapes["cuda"]
    parser = argparse.ArgumentParser(description=f"{contest.about}: time, memory and error of fastpost and its peers.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    for letter, name, cpu, gpu in zip("TDV", ("tokens", "hidden", "vocab"), on_cpu, on_gpu, strict=True):
        parser.add_argument(f"--{name}", type=int, help=f"{letter}; {cpu} on a CPU, {gpu} on a GPU")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    rounds = "{cpu} on a CPU, {cuda} on a GPU".format(**contest.repeats)
    parser.add_argument("--repeats", type=int, help=f"timed rounds; {rounds}")
    parser.add_argument("--quick", action="store_true", help="T, D, V = {}, {}, {} and 3 rounds".format(*contest.quick))
    parser.add_argument("--cases", nargs="+", choices=sorted({c.name for c in contest.cases}), help="only these")
    parser.add_argument("--providers", nargs="+", choices=[p.name for p in contest.peers], help="only these")
    parser.add_argument("--output", type=Path, help="JSON lines; benchmarks/results/<device>-<date>[-<name>].jsonl")
    options = parser.parse_args(argv)
    for name, default in zip(
        ("tokens", "hidden", "vocab"), contest.quick if options.quick else contest.shapes[options.device], strict=True
    ):
        setattr(options, name, getattr(options, name) or default)
    options.repeats = options.repeats or (3 if options.quick else contest.repeats[options.device])
    if options.tokens % SEQUENCES:
        parser.error(f"--tokens must be a multiple of {SEQUENCES}, the sequences in it, got {options.tokens}")
    return options


def opened(contest: Contest, options: argparse.Namespace) -> tuple[Setup, list[Case], list[Peer], Path]:
    """The setup, what is measured of whom, and where that is written."""
    now, shape = datetime.datetime.now().astimezone(), (options.tokens, options.hidden, options.vocab)
    where, started = machine(torch.device(options.device)), now.isoformat(timespec="seconds")
    setup = Setup(where, started, options.dtype, *shape, options.repeats, contest.name)
    cases = [case for case in contest.cases if not options.cases or case.name in options.cases]
    peers = [peer for peer in contest.peers if not options.providers or peer.name in options.providers]
    return setup, cases, peers, options.output or RESULTS / file_name(setup, now)


def main(contest: Contest, argv: Sequence[str] | None = None) -> int:
    options = parse(contest, argv)
    setup, cases, peers, output = opened(contest, options)
    dtype, device = getattr(torch, setup.dtype), torch.device(options.device)
    x = make_inputs(setup.tokens, setup.hidden, setup.vocab, dtype, device)
    measurements: list[Measurement] = []
    try:
        for measured in measure(x, cases, peers, setup):
            append(output, [measured])  # one that is ended by a time limit leaves what it has
            measurements.append(measured)
    except ArithmeticError as error:
        _say(f"fastpost is wrong, so nothing was timed\n{error}")
        return 1
    show(measurements)
    print(f"written to {output}")
    return 0


def file_name(setup: Setup, now: datetime.datetime) -> str:
    where = setup.machine.device if setup.machine.device == "cpu" else setup.machine.name
    slug = re.sub(r"\W+", "-", where).strip("-").lower()
    return f"{slug}-{now:%Y-%m-%d}{'' if setup.bench == 'head' else f'-{setup.bench}'}.jsonl"
