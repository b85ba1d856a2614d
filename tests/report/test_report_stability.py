"""Overlaps of selections against brute force, and what is expected of random sets against all of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.report.conftest import make_record

from weightlora.report.stability import stability
from weightlora.runs.record import Record

Make = Callable[..., Record]


def keeping(indices: list[int], seed: int, shape: str = "holes", **changes: object) -> Record:
    """A run that kept the adapters of these indices."""
    record = make_record(shape, k=1, seed=seed)
    adapters = tuple(dataclasses.replace(a, kept=i in indices) for i, a in enumerate(record.adapters))
    kept = tuple(dataclasses.replace(record.kept[0], name=record.adapters[i].name) for i in sorted(indices))
    return dataclasses.replace(record, adapters=adapters, kept=kept, k=2, **changes)  # type: ignore[arg-type]


N = 7  # the adapters of the shape "holes"
subsets = st.sets(st.integers(0, N - 1), min_size=1, max_size=N - 1).map(sorted)


@given(st.lists(subsets, min_size=2, max_size=5))
def test_overlaps_are_those_of_brute_force(sets: list[list[int]]) -> None:
    (found,) = stability([keeping(kept, seed) for seed, kept in enumerate(sets)])
    pairs = list(itertools.combinations([set(kept) for kept in sets], 2))
    assert found.runs == len(sets)
    assert found.pairs == len(pairs)
    assert found.n == N
    assert found.sizes == (min(map(len, sets)), max(map(len, sets)))
    assert found.shared == pytest.approx(sum(len(a & b) for a, b in pairs) / len(pairs))
    assert found.overlap == pytest.approx(sum(len(a & b) / min(len(a), len(b)) for a, b in pairs) / len(pairs))
    names = [adapter.name for adapter in found.adapters]
    assert found.counts == {names[i]: times for i in range(N) if (times := sum(i in kept for kept in sets))}


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 2), (3, 3), (2, 5), (1, 6)])
def test_what_is_expected_of_random_sets_is_the_mean_over_all_of_them(a: int, b: int) -> None:
    (found,) = stability([keeping(list(range(a)), 0), keeping(list(range(b)), 1)])
    pairs = [
        (set(one), set(other))
        for one in itertools.combinations(range(N), a)
        for other in itertools.combinations(range(N), b)
    ]
    assert found.random_shared == pytest.approx(sum(len(x & y) for x, y in pairs) / len(pairs))
    assert found.random_overlap == pytest.approx(sum(len(x & y) / min(a, b) for x, y in pairs) / len(pairs))


def test_only_seeds_that_chose_are_compared() -> None:
    one, other = keeping([0, 1], 0), keeping([1, 2], 1)
    assert stability([one]) == []
    assert stability([one, dataclasses.replace(one)]) == [], "the same seed twice agrees with itself"
    every = list(range(N))
    assert stability([keeping(every, 0), keeping(every, 1)]) == [], "who keeps all has not chosen"
    failed = dataclasses.replace(other, status="failed", error="out of memory")
    assert stability([one, failed]) == []
    (found,) = stability([one, other, failed, keeping([0], 5, "one")])
    assert (found.runs, found.pairs, found.shared, found.overlap) == (2, 1, 1, 0.5)


def test_methods_are_looked_at_apart() -> None:
    records = [keeping([seed], seed, method=method) for method in ("random", "top") for seed in (0, 1, 2)]
    assert [(entry.label, entry.overlap) for entry in stability(records)] == [("random", 0.0), ("top", 0.0)]
