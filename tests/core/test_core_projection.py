"""Projection against brute force over every support."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlora.core.projection import Rule, support, top_k
from weightlora.errors import WeightLoRAError

RULES: tuple[Rule, ...] = ("signed", "positive", "magnitude")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Few distinct values, so that ties, zeros and both signs of zero are common.
entries = st.sampled_from([-3.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0]) | st.floats(-4, 4)
vectors = st.lists(entries, min_size=1, max_size=8)


def nearest(values: list[float], k: int, *, positive: bool) -> float:
    """Smallest squared distance from `values` to a vector with at most k non-zeros (>= 0 if positive)."""
    distances = []
    for size in range(min(k, len(values)) + 1):
        for kept in combinations(range(len(values)), size):
            point = [(max(v, 0.0) if positive else v) if i in kept else 0.0 for i, v in enumerate(values)]
            distances.append(sum((z - v) ** 2 for z, v in zip(point, values, strict=True)))
    return min(distances)


@settings(max_examples=150, deadline=None)
@given(vectors, st.integers(1, 9), st.sampled_from(("positive", "magnitude")))
def test_is_a_nearest_point(values: list[float], k: int, rule: Rule) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    z = top_k(v, k, rule)
    assert float(((z - v) ** 2).sum()) == pytest.approx(nearest(values, k, positive=rule == "positive"), abs=1e-12)
    assert rule == "magnitude" or bool((z >= 0).all())


@settings(max_examples=150, deadline=None)
@given(vectors, st.integers(1, 9))
def test_signed_keeps_the_support_with_the_largest_sum(values: list[float], k: int) -> None:
    size = min(k, len(values))
    kept = support(torch.tensor(values, dtype=torch.float64), k)
    best = max(sum(values[i] for i in chosen) for chosen in combinations(range(len(values)), size))
    assert len(kept) == size
    assert sum(values[i] for i in kept) == pytest.approx(best, abs=1e-12)
    # The documented equivalence: the support of the Euclidean projection of v + c, on values where no tie can arise.
    distinct = [float(i) - 2.0 for i in torch.tensor(values).argsort(stable=True).tolist()]
    shifted = torch.tensor(distinct, dtype=torch.float64)
    assert support(shifted, k) == support(shifted + 3.0, k, "magnitude")


@settings(max_examples=100, deadline=None)
@given(vectors, st.integers(1, 9), st.sampled_from(RULES), st.sampled_from(DTYPES))
def test_sparse_idempotent_and_consistent_with_support(values: list[float], k: int, rule: Rule, dtype) -> None:
    v = torch.tensor(values, dtype=dtype)
    before = v.clone()
    z = top_k(v, k, rule)
    assert torch.equal(v, before)
    assert z.data_ptr() != v.data_ptr()
    assert z.dtype == dtype
    assert int((z != 0).sum()) <= k
    if rule != "signed" or bool((z >= 0).all()):  # under "signed" a kept negative entry loses to a zero
        assert torch.equal(top_k(z, k, rule), z)
    kept = support(v, k, rule)
    expected = torch.zeros_like(v)
    expected[kept] = v[kept]
    assert torch.equal(z, expected)


@pytest.mark.parametrize("rule", RULES)
def test_ties_go_to_the_lowest_index(rule: Rule) -> None:
    # Long enough that an unstable sort would show itself.
    ties = torch.ones(5000)
    assert support(ties, 700, rule) == list(range(700))
    assert support(torch.tensor([0.3, 2.0, 0.3, 0.3]), 2, rule) == [0, 1]
    assert top_k(torch.tensor([0.3, -2.0, 1.1, 0.3]), 2).tolist() == pytest.approx([0.3, 0, 1.1, 0])


def test_the_two_zeros_tie() -> None:
    assert support(torch.tensor([-0.0, 0.0, -0.0, 0.0]), 2) == [0, 1]


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(8)), st.integers(1, 8), st.sampled_from(RULES))
def test_permuting_distinct_values_permutes_the_result(order: list[int], k: int, rule: Rule) -> None:
    v = torch.tensor([-2.5, 0.7, 3.0, -0.1, 1.9, -3.3, 0.2, 2.2])
    assert torch.equal(top_k(v[order], k, rule), top_k(v, k, rule)[order])


def test_k_of_all_changes_nothing_but_clamps_positive() -> None:
    v = torch.tensor([1.0, -2.0, 0.5])
    for k in (3, 9):
        assert torch.equal(top_k(v, k), v)
        assert torch.equal(top_k(v, k, "magnitude"), v)
        assert top_k(v, k, "positive").tolist() == [1.0, 0.0, 0.5]
        assert support(v, k, "positive") == [0, 2]
    assert support(-v.abs(), 2, "positive") == []


def test_a_negative_gate_survives_only_under_signed_and_magnitude() -> None:
    v = torch.tensor([2.0, -1.0, -4.0])
    assert top_k(v, 2).tolist() == [2.0, -1.0, 0.0]
    assert top_k(v, 2, "positive").tolist() == [2.0, 0.0, 0.0]
    assert top_k(v, 2, "magnitude").tolist() == [2.0, 0.0, -4.0]


def test_nan_is_refused_with_its_places() -> None:
    v = torch.zeros(40)
    v[[3, 7]] = float("nan")
    with pytest.raises(WeightLoRAError, match=r"NaN at \[3, 7\]"):
        support(v, 2)
    assert top_k(v, 1).isnan().sum() == 1  # the host is not asked
    v[:] = float("nan")
    with pytest.raises(WeightLoRAError, match="and 24 more"):
        support(v, 2, "magnitude")
    assert support(torch.tensor([1.0, float("inf"), -float("inf")]), 2) == [0, 1]
