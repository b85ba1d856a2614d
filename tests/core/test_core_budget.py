"""Budget arithmetic against brute force, and the parameter counts of the paper's tables."""

from __future__ import annotations

from decimal import Decimal
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlora.core.budget import (
    adapter_params,
    grown_ranks,
    k_for_params,
    parse_params,
    rank_for_params,
    resolve_k,
    total_params,
)
from weightlora.errors import AdapterError, ConfigError, WeightLoRAError

SQUARE = (768, 768)
sizes = st.integers(1, 12)
shape_lists = st.lists(st.tuples(sizes, sizes), min_size=1, max_size=5)


def test_counts_of_the_paper() -> None:
    assert adapter_params(8, 768, 768) == 12_288
    assert total_params([8] * 36, [SQUARE] * 36) == 442_368
    assert [total_params([8] * k, [SQUARE] * k) for k in (1, 5, 10)] == [12_288, 61_440, 122_880]
    assert rank_for_params(442_368, [SQUARE] * 36) == 8
    assert k_for_params(442_368, 8, [SQUARE] * 36) == 36
    # Llama-3.1-8B, all seven linears of 32 layers.
    llama = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)] * 32
    assert total_params([8] * 224, llama) == 20_971_520


def test_a_quarter_of_the_adapters_gets_four_times_the_rank() -> None:
    squares = [SQUARE] * 60
    budget = total_params([8] * 60, squares)
    assert budget == 737_280
    ranks = grown_ranks(budget, squares[:15], [8] * 15)
    assert ranks == [32] * 15
    assert total_params(ranks, squares[:15]) == budget
    # The published 958,464 are 60 adapters too: per layer q, k, v, attention output and the wide FFN output.
    layer = [SQUARE] * 4 + [(3072, 768)]
    budget = total_params([8] * 60, layer * 12)
    assert budget == 958_464
    ranks = grown_ranks(budget, layer * 3, [8] * 15)
    assert ranks == [32] * 15
    assert total_params(ranks, layer * 3) == budget


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), shape_lists, st.data(), st.none() | st.integers(1, 10))
def test_uniform_growth_is_the_largest_that_fits(
    budget: int, shapes: list[tuple[int, int]], data: st.DataObject, max_rank: int | None
) -> None:
    ranks = [data.draw(st.integers(1, min(shape))) for shape in shapes]
    candidates = []
    for rank in range(1, 14):
        caps = [min(*shape, max_rank or 99) for shape in shapes]
        candidate = [max(low, min(rank, cap)) for low, cap in zip(ranks, caps, strict=True)]
        if sum(r * (a + b) for r, (a, b) in zip(candidate, shapes, strict=True)) <= budget:
            candidates.append(candidate)
    expected = candidates[-1] if candidates else ranks
    assert grown_ranks(budget, shapes, ranks, max_rank=max_rank) == expected


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), shape_lists, st.data())
def test_remainder_is_spent_from_the_top(budget: int, shapes: list[tuple[int, int]], data: st.DataObject) -> None:
    ranks = [data.draw(st.integers(1, min(shape))) for shape in shapes]
    order = data.draw(st.permutations(range(len(shapes))))
    base = grown_ranks(budget, shapes, ranks)
    got = grown_ranks(budget, shapes, ranks, order=order, remainder="top")
    expected, left = list(base), budget - total_params(base, shapes)
    while True:  # the same rule, restarted from scratch at every round
        affordable = [i for i in order if expected[i] < min(shapes[i]) and sum(shapes[i]) <= left]
        if not affordable:
            break
        for i in affordable:
            if sum(shapes[i]) <= left:
                expected[i] += 1
                left -= sum(shapes[i])
    assert got == expected
    assert total_params(got, shapes) <= max(budget, total_params(ranks, shapes))


def test_what_a_narrow_adapter_cannot_use_goes_to_the_others() -> None:
    assert grown_ranks(10_000, [(100, 100), (100, 2)], [1, 1]) == [48, 2]
    assert grown_ranks(10_000, [(100, 100), (100, 2)], [1, 1], max_rank=16) == [16, 2]
    # A head with two outputs at rank 8 is wider than its cap: it stays.
    assert grown_ranks(10_000, [(100, 100), (100, 2)], [8, 8]) == [45, 8]


def test_growth_never_shrinks() -> None:
    assert grown_ranks(10, [SQUARE] * 2, [4, 6]) == [4, 6]
    assert grown_ranks(10 * 1536, [SQUARE] * 2, [2, 6]) == [4, 6]
    assert grown_ranks(100, [], []) == []


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 600), st.integers(1, 4), shape_lists)
def test_rank_and_k_for_params(params: int, r: int, shapes: list[tuple[int, int]]) -> None:
    ranks = [rank for rank in range(1, 601) if total_params([rank] * len(shapes), shapes) <= params]
    if ranks:
        assert rank_for_params(params, shapes) == max(ranks)
    else:
        with pytest.raises(ConfigError, match="too few"):
            rank_for_params(params, shapes)
    fits = [
        k
        for k in range(1, len(shapes) + 1)
        if all(total_params([r] * k, chosen) <= params for chosen in combinations(shapes, k))
    ]
    if fits:
        assert k_for_params(params, r, shapes) == max(fits)
    else:
        with pytest.raises(ConfigError, match="too few"):
            k_for_params(params, r, shapes)


def test_no_adapters() -> None:
    for call in (lambda: rank_for_params(10, []), lambda: k_for_params(10, 1, []), lambda: resolve_k(1, 0)):
        with pytest.raises(AdapterError, match="no adapters"):
            call()


def test_resolve_k() -> None:
    assert [resolve_k(k, 36) for k in (1, 36, 1.0, 0.25, 0.5, 0.001, 0.999)] == [1, 36, 36, 9, 18, 1, 36]
    assert resolve_k(0.25, 6) == 2  # 1.5, half up
    assert resolve_k(0.29, 50) == 15  # 14.5 as written, 14.499999999999998 in binary
    for n in range(1, 60):
        for hundredths in range(1, 101):
            exact = Decimal(hundredths) * n / 100
            assert resolve_k(hundredths / 100, n) == max(1, int(exact + Decimal("0.5")))


@pytest.mark.parametrize("k", [0, -3, 37, 0.0, -0.5, 1.5, 10.0, float("nan"), float("inf"), True, "5", None])
def test_resolve_k_refuses(k: object) -> None:
    with pytest.raises(ConfigError, match=r"use 1\.\.36 or a fraction such as 0\.25"):
        resolve_k(k, 36)  # type: ignore[arg-type]


def test_resolve_k_says_what_was_asked() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_k(37, 36)
    assert str(caught.value) == (
        "k=37 asks for more adapters than the 36 the model has; use 1..36 or a fraction such as 0.25"
    )


def test_parse_params() -> None:
    cases = {"123k": 123_000, "1.2M": 1_200_000, " 0.5 K ": 500, "2b": 2_000_000_000, "442_368": 442_368, "7": 7}
    assert {text: parse_params(text) for text in cases} == cases
    assert parse_params(42) == 42
    assert parse_params("1.2345k") == 1234
    assert parse_params("1.1k") == 1100
    for wrong in ("", "k", "-3k", "1e", "0", "0.0001k", "12x", "1.2.3M", "٣k", 0, -1, True, 1.5, None):
        with pytest.raises(WeightLoRAError, match="not a number of parameters"):
            parse_params(wrong)  # type: ignore[arg-type]
