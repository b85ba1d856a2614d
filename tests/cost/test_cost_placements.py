"""The cost of placements as a sum, against what the trace says of each set."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.builders import ALL_LINEAR, FAMILIES, batch, lora

from weightlora.core.placement import PlacementCosts
from weightlora.cost import ActivationTrace, placement_costs, trace


@cache
def traced(family: str) -> ActivationTrace:
    model = lora(family, 2, targets=ALL_LINEAR[family]).train()
    return trace(model, lambda: model(**batch()).loss)


@cache
def priced(family: str, checkpointing: bool) -> PlacementCosts:
    return placement_costs(traced(family), checkpointing=checkpointing)


def cost(costs: PlacementCosts, live: set[int]) -> int:
    floor = costs.floor[min(costs.depth[i] for i in live)]
    return floor + sum(costs.own[i] for i in live) + sum(costs.group_bytes[g] for g in {costs.group[i] for i in live})


def true(found: ActivationTrace, live: set[int], checkpointing: bool) -> int:
    return found.kept(live, checkpointing=checkpointing) + (found.recomputed(live) if checkpointing else 0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_never_too_little(family: str, checkpointing: bool, data: st.DataObject) -> None:
    found, costs = traced(family), priced(family, checkpointing)
    n = len(found.adapters)
    live = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n))
    assert cost(costs, live) >= true(found, live, checkpointing)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_for_whole_levels(family: str) -> None:
    """With every adapter from some level upwards alive, nothing is left to estimate."""
    found, costs = traced(family), priced(family, False)
    for level in range(len(costs.floor)):
        live = {i for i, depth in enumerate(costs.depth) if depth >= level}
        excess = cost(costs, live) / found.kept(live) - 1
        # DeBERTa's position table and BART's encoder output are read by adapters of many levels.
        assert 0 <= excess <= (0.2 if family in ("deberta", "bart") else 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_and_order(family: str) -> None:
    found, costs = traced(family), priced(family, False)
    n = len(found.adapters)
    assert len(costs.depth) == len(costs.own) == len(costs.group) == n
    assert set(costs.depth) == set(range(len(costs.floor)))
    assert set(costs.group) <= set(range(len(costs.group_bytes)))
    assert list(costs.floor) == sorted(costs.floor, reverse=True)
    # Query, key and value of the first block read one input.
    qkv = [i for i, a in enumerate(found.adapters) if costs.depth[i] == 0]
    assert len(qkv) == 3
    assert len({costs.group[i] for i in qkv}) == 1


def test_state_and_base_are_added() -> None:
    found, plain = traced("bert"), priced("bert", False)
    state = list(range(100, 100 + len(found.adapters)))
    more = placement_costs(found, state, base=1000)
    assert [b - a for a, b in zip(plain.own, more.own, strict=True)] == state
    assert [b - a for a, b in zip(plain.floor, more.floor, strict=True)] == [1000] * len(plain.floor)


def test_an_encoder_lies_below_its_decoder() -> None:
    found, costs = traced("bart"), priced("bart", False)
    encoder = [costs.depth[i] for i, a in enumerate(found.adapters) if ".encoder." in a.name]
    decoder = [costs.depth[i] for i, a in enumerate(found.adapters) if ".decoder." in a.name]
    assert max(encoder) < min(decoder)
