"""What a case should cost fastpost, by counted.py: the schedule that the head picks for it, and how its sweeps cut."""

from __future__ import annotations

from dataclasses import replace

import torch
from cases import JSD_BETA, Case, Inputs
from counted import Cost, Pass, Schedule, Work, backward_work, cost

from fastpost.core.door import Door, open_door
from fastpost.core.eager import eager_sweep
from fastpost.core.sweep import Sweep
from fastpost.types import IGNORE, NEEDS_REFERENCE


def expected(case: Case, x: Inputs, fused: bool) -> Cost:
    """Of `fused_loss`, or of `token_stats` and the loss of its statistics."""
    head = _of_call(_open(x, case), case.loss.differentiates, _rows_of_unit(case, x) if fused else None)
    if not case.scores_reference:
        return head
    with torch.no_grad():
        return head + _of_call(_open(replace(x, hidden=x.hidden_q, weight=x.weight_q), None), (), None)


def _open(x: Inputs, case: Case | None) -> Door:
    reads, reference = ("logp",) if case is None else case.loss.reads, None
    if case is not None and case.compares:
        reference = (x.hidden_q, x.weight_q)
    return open_door(x.hidden, x.weight, x.batch.target, reads, reference, 1.0, JSD_BETA, IGNORE)


def _rows_of_unit(case: Case, x: Inputs) -> int:
    T, S = x.batch.target.numel(), x.batch.lengths.numel()
    return {"token": 1, "sequence": T // S, "pair": 2 * T // S, "batch": T}[case.loss.unit]


def _rows(s: Sweep) -> int:
    """Of a chunk, where any may be its last."""
    first = next(s.chunks(), slice(0, 1))
    return first.stop - first.start


def _of_call(door: Door, carrying: tuple[str, ...], unit: int | None) -> Cost:
    """`unit`: how many rows must be seen together; None: the statistics are tensors of the caller's."""
    p, operands = door.problem, door.operands
    keeps = set(carrying) <= {"logp"} and p.teacher is None and "jsd" not in p.row_wants
    held = eager_sweep(p, operands, kept=keeps)
    schedule: Schedule = "lazy"
    if not carrying or not (door.needs_rows or door.needs_head):
        schedule = "statistics"
    elif not door.needs_head and set(carrying) == {"logp"}:
        schedule = "frozen"
    elif unit is not None and unit <= held.rows_each:
        schedule = "kept" if keeps else "eager"

    leaves = {"hidden": operands.hidden, "weight": operands.weight}
    work = Work(
        len(p),
        held.D,
        held.V,
        D_q=p.dense.operands.hidden.shape[1] if p.dense else 0,
        jsd="jsd" in p.row_wants,
        compares=bool(set(carrying) & NEEDS_REFERENCE),
        trains=frozenset(name for name, leaf in leaves.items() if leaf.requires_grad),
        stored=p.dtype.itemsize,
        multiplied=held.gemm.tile_dtype.itemsize,
        wide=held.wide.itemsize,
    )
    back_work = backward_work(work)
    back_sweep = Sweep(p if back_work.D_q else replace(p, reference=None), operands, held=False)
    back = Pass(back_work, _rows(back_sweep), back_sweep.columns_each, held=False)
    if schedule in ("kept", "eager"):
        assert unit is not None
        rows = _rows(held) if unit == 1 else held.rows_each // unit * unit
        there = Pass(work, rows, held.columns_each, held=not keeps)
    else:
        sweep = Sweep(p, operands, held=work.jsd)
        there = Pass(work, _rows(sweep), sweep.columns_each, held=work.jsd)
    return cost(schedule, there, back)
