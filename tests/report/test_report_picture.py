"""The parts that pictures are made of: outlines, points that are left out, scales."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from weightlora.report.charts import BOTTOM, _apart, _brief
from weightlora.report.picture import Axis, Path, Picture, box, dot, line, star, thin

places = st.floats(-500, 500, allow_nan=False)
points = st.lists(st.tuples(places, places), min_size=1, max_size=60)


def corners(d: str) -> list[tuple[float, float]]:
    """The corners that a browser would draw of an outline of ours: M, then relative steps."""
    start, _, steps = d.removeprefix("M").partition("l")
    numbers = [float(word) for word in re.findall(r"-?[\d.]+", steps)]
    x, y = map(float, re.findall(r"-?[\d.]+", start))
    found = [(x, y)]
    for dx, dy in zip(numbers[::2], numbers[1::2], strict=True):
        x, y = x + dx, y + dy
        found.append((x, y))
    return found


@given(points)
def test_no_corner_is_off_by_more_than_the_rounding(given_points: list[tuple[float, float]]) -> None:
    drawn = corners(line(given_points))
    assert len(drawn) == len(given_points)
    for (x, y), (a, b) in zip(drawn, given_points, strict=True):
        assert abs(x - a) <= 0.0501
        assert abs(y - b) <= 0.0501


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(4, 40))
def test_thinning_keeps_order_and_extremes(values: list[float], most: int) -> None:
    curve = list(enumerate(values))
    kept = list(thin(curve, most))
    assert len(kept) <= max(most, 4)
    assert kept == sorted(set(kept) & set(curve))
    assert min(y for _, y in kept) == min(values)
    assert max(y for _, y in kept) == max(values)


@example([999999501.0, 999999502.0])
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20))
def test_a_scale_shows_every_value_and_round_ticks(values: list[float]) -> None:
    axis = Axis.around(values, 200, 20)
    assert all(20 - 1e-6 <= axis.at(value) <= 200 + 1e-6 for value in values)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 6
    for place, words in ticks:
        assert 20 - 1e-6 <= place <= 200 + 1e-6
        assert axis.at(float(words)) == pytest.approx(place, abs=1)


def test_a_scale_of_nothing_and_of_one_value() -> None:
    assert Axis.around([float("nan")], 0, 1).at(0.5) == 0.5
    assert Axis.around([3.0], 0, 10).at(3.0) == 5
    assert Axis.around([0.0], 0, 10).at(0.0) == 5


@given(st.lists(st.floats(30, BOTTOM), min_size=1, max_size=8))
def test_names_beside_a_chart_never_overlap(ends: list[float]) -> None:
    moved = _apart(sorted(ends))
    assert all(below - above >= 12 - 1e-9 for above, below in itertools.pairwise(moved))
    assert moved[-1] <= BOTTOM + 1e-9


@given(st.text("ab.", min_size=1, max_size=40), st.integers(0, 99))
def test_a_brief_name_keeps_layer_and_ending(kind: str, layer: int) -> None:
    short = f"{layer}.{kind}"
    brief = _brief(short, 100)
    assert len(brief) <= 16
    assert brief.startswith(str(layer))
    assert brief == short or (brief.partition("…")[2] and short.endswith(brief.partition("…")[2]))


def test_a_plain_picture_looks_the_same() -> None:
    paths = (Path(d=box(0, 0, 2, 1), look="a", title="x"), Path(d=dot(1, 1), look="b"), Path(d=star(1, 1, 1), look="a"))
    plain = Picture(name="p", title="", about="", height=1, paths=paths, texts=()).plain()
    assert [(path.look, path.title) for path in plain.paths] == [("a", ""), ("b", "")]
    assert plain.paths[0].d == paths[0].d + paths[2].d


def test_a_number_out_of_all_reason_is_drawn_outside() -> None:
    axis = Axis.around([1.0, 1e308, 2.0, float("inf"), -1e308], 0, 100)
    assert (axis.low, axis.high) == pytest.approx((0.95, 2.05))
    assert (axis.at(1e308), axis.at(-1e308), axis.at(10**400)) == (1e6, -1e6, 1e6)
    assert "e" not in line([(axis.at(x), 1.0) for x in (1.0, 1e308, -1e308)])
