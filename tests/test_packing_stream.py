"""Packs of a stream: every row once, little memory, little waste, and on from any step as if it had never stopped."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from fastpost.packing import Cursor, Step, plan, steps, stream
from test_packing_fit import lognormal

ROWS = list(enumerate(lognormal(3000, 60, 0.9, 512)))  # (its number, its length)
TOKENS, PER_STEP = 512, 4


def length(row: tuple[int, int]) -> int:
    return row[1]


def streamed(rows=ROWS, unit: int = 1, window: int = 32, **options) -> Iterator[Step[tuple[int, int]]]:
    return stream(rows, length, TOKENS, PER_STEP, unit, window=window, **options)


def numbers(taken: list[Step[tuple[int, int]]]) -> list[list[list[int]]]:
    return [[[step.rows[i][0] for i in pack] for pack in step.packs] for step in taken]


@pytest.mark.filterwarnings("ignore:.*dropped")
@pytest.mark.parametrize("unit", [1, 2, 5])
@pytest.mark.parametrize("window", [4, 32, 10_000])
def test_every_row_is_in_one_pack_whole_units_together(unit, window):
    taken = list(streamed(unit=unit, window=window, drop=True))
    fits = [i // unit * unit for i in range(0, 3000, unit) if sum(n for _, n in ROWS[i : i + unit]) <= TOKENS]
    packs = [pack for step in numbers(taken) for pack in step]
    assert sorted(row for pack in packs for row in pack) == [i + j for i in fits for j in range(unit)]
    assert all(sum(ROWS[row][1] for row in pack) <= TOKENS for pack in packs)
    units = [pack[i : i + unit] for pack in packs for i in range(0, len(pack), unit)]
    assert all(rows == list(range(rows[0], rows[0] + unit)) for rows in units)
    assert all(len(step.packs) == PER_STEP for step in taken[:-1])
    assert all(sum(map(len, step.packs)) == len(step.rows) for step in taken)


def test_a_window_that_holds_all_is_the_plan_of_all():
    packs = plan([n for _, n in ROWS], TOKENS)
    assert numbers(list(streamed(window=10_000, seed=3, epoch=2))) == steps(packs, PER_STEP, 3, 2, 0)


def test_order_is_of_seed_and_epoch_and_rows_stay_where_they_are():
    first, again, other, later = (
        numbers(list(streamed(seed=seed, epoch=epoch))) for seed, epoch in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert first == again and first != other != later != first
    packs = [sorted(pack for step in each for pack in step) for each in (first, other, later)]
    assert packs[0] == packs[1] == packs[2]


@pytest.mark.parametrize("unit", [1, 2])
def test_it_goes_on_from_any_step_by_a_cursor_that_was_written_down(unit):
    rows = [(i, min(n, 200)) for i, n in ROWS[:1200]]
    taken = list(streamed(rows, unit, seed=5))
    whole = numbers(taken)
    assert any(step.then.carried for step in taken) and any(step.then.step for step in taken)
    for i in range(0, len(taken), 3):
        cursor = Cursor(**json.loads(json.dumps(asdict(taken[i].then))))
        rest = list(streamed(iter(rows), unit, seed=5, start=cursor))
        assert numbers(rest) == whole[i + 1 :]
        assert [asdict(step.then) for step in rest] == [asdict(step.then) for step in taken[i + 1 :]]
    assert list(streamed(rows, unit, seed=5, start=taken[-1].then)) == []


def test_no_more_is_held_than_two_windows():
    class Row(list):
        """Can be watched; has as many entries as the row has tokens."""

    alive: weakref.WeakSet[Row] = weakref.WeakSet()
    Row.__hash__ = object.__hash__  # pyright: ignore
    most = 0

    def endless() -> Iterator[Row]:
        nonlocal most
        for i in itertools.count():
            row = Row([0] * ROWS[i % len(ROWS)][1])
            alive.add(row)
            most = max(most, sum(map(len, alive)))
            yield row

    for _ in itertools.islice(stream(endless(), len, TOKENS, PER_STEP, window=8), 100):
        pass
    assert 8 * TOKENS < most < 2 * (8 * TOKENS + 512)


def test_windows_waste_little_since_what_is_not_full_waits():
    def fill(window: int) -> float:
        taken = list(streamed(window=window))
        return sum(n for step in taken for _, n in step.rows) / TOKENS / sum(len(step.packs) for step in taken)

    for window in (16, 32, 64):
        tokens, cut, apart = 0, [0], []
        for i, (_, n) in enumerate(ROWS, 1):
            tokens += n
            if tokens >= window * TOKENS or i == len(ROWS):
                apart.append(len(plan([n for _, n in ROWS[cut[-1] : i]], TOKENS)))
                cut.append(i)
                tokens = 0
        assert fill(window) > 0.99 > sum(n for _, n in ROWS) / TOKENS / sum(apart)


def test_a_source_that_can_skip_is_resumed_by_its_own_skip():
    class Seekable(list):
        def skip(self, n: int) -> list[tuple[int, int]]:
            skipped.append(n)
            return self[n:]

    skipped: list[int] = []
    taken = list(streamed(Seekable(ROWS)))
    rest = list(streamed(Seekable(ROWS), start=taken[20].then))
    assert numbers(rest) == numbers(taken[21:])
    assert skipped[0] == 0 and skipped[1] == min(taken[20].then.carried) > 0


def test_a_streamed_data_set_goes_on_too():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"row": row, "length": n} for row, n in ROWS[:600]]).to_iterable_dataset()
    run = lambda **options: list(stream(rows, lambda row: row["length"], TOKENS, PER_STEP, window=16, **options))  # noqa: E731
    taken = run()
    assert [step.rows for step in run(start=taken[7].then)] == [step.rows for step in taken[8:]] != []


def test_what_cannot_be_packed_is_named_or_dropped_and_counted():
    rows = [(0, 5), (1, 0), (2, 600), (3, 7)]
    with pytest.raises(ValueError, match="row 1 has 0 tokens: a row must have at least one"):
        list(streamed(rows))
    with pytest.warns(UserWarning) as said:
        (step,) = streamed(rows, drop=True)
    assert step.rows == [(0, 5), (3, 7)]
    assert [str(warning.message) for warning in said] == [
        "dropped, and more like it will be: row 1 has 0 tokens: a row must have at least one",
        "rows dropped: 2; the first: row 1 has 0 tokens: a row must have at least one",
    ]
    with pytest.raises(ValueError, match="got unit 3 and 4 rows"):
        list(streamed([(i, 5) for i in range(4)], unit=3))
    with pytest.raises(ValueError, match="window must be a multiple of packs_per_step, got 30 packs and 4 a step"):
        streamed(window=30)
    assert list(streamed([])) == []
