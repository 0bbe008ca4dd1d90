"""Best fit, largest first: the C++ function, its twin and the definition agree on every pack, and little is wasted."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

import fastpost
from fastpost.packing import fit, plan


def by_definition(sizes: Sequence[int], room: int) -> list[int]:
    """One unit at a time, every pack looked at: the least room that holds it, among equals the last to come to it."""
    found, left, since = [0] * len(sizes), [], []
    for time, u in enumerate(sorted(range(len(sizes)), key=lambda u: (-sizes[u], u))):
        fitting = [pack for pack in range(len(left)) if left[pack] >= sizes[u]]
        pack = min(fitting, key=lambda pack: (left[pack], -since[pack]), default=len(left))
        if pack == len(left):
            left.append(room)
            since.append(time)
        found[u], left[pack], since[pack] = pack, left[pack] - sizes[u], time
    return found


def problems(count: int, most: int):
    rng = random.Random(count)
    for _ in range(count):
        room = rng.randint(1, 60)
        longest = rng.randint(1, room)  # short ones alone, too: many share a pack, and many are equal
        yield [rng.randint(1, longest) for _ in range(rng.randint(0, most))], room


def lognormal(rows: int, median: float, spread: float, longest: int) -> list[int]:
    rng = random.Random(rows)
    return [max(1, min(longest, round(median * rng.lognormvariate(0, spread)))) for _ in range(rows)]


@pytest.fixture
def native():
    found = fit.native()
    if found is None:
        pytest.skip("the native extension is not built, or is older than its sources")
    return found


def test_the_twin_is_the_definition():
    for sizes, room in problems(500, 60):
        assert fit.best_fit_twin(sizes, room) == by_definition(sizes, room), (sizes, room)


def test_the_native_function_is_the_definition(native):
    for sizes, room in problems(500, 60):
        assert native(sizes, room) == by_definition(sizes, room), (sizes, room)


@pytest.mark.parametrize("room", [97, 4096, 10**12])
def test_both_give_the_same_packs_of_many_units(native, room):
    sizes = lognormal(30_000, 300, 1.0, min(room, 2**40))
    assert native(sizes, room) == fit.best_fit_twin(sizes, room)


def test_the_native_function_refuses_what_no_pack_holds(native):
    for sizes in ([3, 9], [3, 0], [3, -1]):
        with pytest.raises(RuntimeError, match="unit 1 must be of 1 to 8 tokens"):
            native(sizes, 8)


def test_without_the_extension_or_with_an_older_one_the_twin_is_used(monkeypatch):
    lengths = lognormal(300, 20, 0.8, 100)
    packs = plan(lengths, 128)
    monkeypatch.setattr(fastpost, "_native", SimpleNamespace(LAYOUT=0), raising=False)
    monkeypatch.setitem(sys.modules, "fastpost._native", fastpost._native)
    assert fit.native() is None and plan(lengths, 128) == packs
    monkeypatch.delattr(fastpost, "_native")
    monkeypatch.setitem(sys.modules, "fastpost._native", None)  # as if it was not there
    assert fit.native() is None and plan(lengths, 128) == packs


# (median, spread of the logarithm, longest, a pack)
@pytest.mark.parametrize(
    "shape", [(300, 0.9, 2048, 2048), (300, 0.9, 2048, 4096), (700, 1.0, 8192, 8192), (5000, 1.2, 131072, 131072)]
)
def test_lengths_of_texts_fill_99_percent(shape):
    *lengths_of, max_tokens = shape
    lengths = lognormal(20_000, *lengths_of)
    assert sum(lengths) >= 0.99 * max_tokens * len(plan(lengths, max_tokens))
