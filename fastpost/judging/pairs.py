"""Rows -> pairs to judge. Where the better answer is known by its column, a coin says which is named first."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, get_args

from fastpost.data.columns import check_columns, columns_of, row_at
from fastpost.data.pairs import split_pair
from fastpost.files import Row, Rows
from fastpost.judging.verdicts import Winner


@dataclass(frozen=True)
class Judged:
    """Two answers, and what is known of them."""

    prompt: Any
    first: Any
    second: Any
    label: Winner | None
    authors: tuple[str | None, str | None]
    columns: Mapping[str, Any]  # of the row, all of them


def read_judged(rows: Rows, path: str | PathLike[str], seed: int) -> list[Judged]:
    """One of each row."""
    present = columns_of(rows)
    if {"first", "second"} <= set(present):
        return [_named(row, row_at(path, i)) for i, row in enumerate(rows)]
    if not {"chosen", "rejected"} <= set(present):
        raise ValueError(
            f"{path}: judge takes the columns chosen and rejected, or prompt, first and second; this file has {present}"
        )
    check_columns(rows, "dpo", path)
    return [_labelled(row, row_at(path, i), random.Random(f"{seed} {i}").random() < 0.5) for i, row in enumerate(rows)]


def _labelled(row: Row, where: str, ahead: bool) -> Judged:
    prompt, chosen, rejected = split_pair(row, where)
    by = row.get("chosen_model"), row.get("rejected_model")
    if ahead:
        return Judged(prompt, chosen, rejected, "first", by, row)
    return Judged(prompt, rejected, chosen, "second", (by[1], by[0]), row)


def _named(row: Row, where: str) -> Judged:
    for name in ("prompt", "first", "second"):
        if not isinstance(row.get(name), str | list) or not row[name]:
            raise ValueError(f"{where}, column {name!r} must be text or messages, got {row.get(name)!r:.60}")
    label = row.get("label")
    if label is not None and label not in get_args(Winner):
        raise ValueError(f"{where}, column 'label' must be first, second or tie, got {label!r:.60}")
    by = row.get("first_model"), row.get("second_model")
    return Judged(row["prompt"], row["first"], row["second"], label, by, row)
