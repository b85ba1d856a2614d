"""The tests' own tools."""

from __future__ import annotations

import itertools

import pytest
from tests.builders import a_third, pairs


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


@pytest.mark.parametrize("count", [1, 2, 3, 26, 32])
def test_each_case_is_in_the_suite_of_one_test_in_three(count: int) -> None:
    cases = [(number, str(number)) for number in range(count)]
    thirds = [a_third(cases, first) for first in range(3)]
    for number, case in enumerate(cases):
        (run,) = [third[number] for third in thirds if third[number] == case]
        left = [third[number] for third in thirds if third[number] is not run]
        assert [(each.values, [mark.name for mark in each.marks]) for each in left] == [(case, ["long"])] * 2
