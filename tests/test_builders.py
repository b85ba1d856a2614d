"""The tests' own tools."""

from __future__ import annotations

import itertools

import pytest
from tests.builders import pairs


@pytest.mark.parametrize(
    ("sizes", "count"), [((3, 2), 6), ((4, 3, 2), 12), ((3, 2, 2), 6), ((2, 2, 2, 2), 6), ((4, 4, 4), 16)]
)
def test_any_two_values_meet_in_few_combinations(sizes: tuple[int, ...], count: int) -> None:
    values = [[f"{place}-{index}" for index in range(size)] for place, size in enumerate(sizes)]
    chosen = pairs(*values)
    for one, other in itertools.combinations(range(len(sizes)), 2):
        assert {(case[one], case[other]) for case in chosen} == set(itertools.product(values[one], values[other]))
    assert len(chosen) == len(set(chosen)) == count
    assert chosen == pairs(*values)
