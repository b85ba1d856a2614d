"""The gate step against plain numpy, and the shapes of the gradual k."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlora.core.gates import Shape, gate_step, gradual_k
from weightlora.core.projection import Rule

SHAPES: tuple[Shape, ...] = ("constant", "cubic", "halving")
gates = st.lists(
    st.tuples(st.floats(-2, 2).map(lambda x: round(x, 2)), st.floats(-1, 1).map(lambda x: round(x, 2))),
    min_size=1,
    max_size=10,
)


def reference(omega: np.ndarray, grad: np.ndarray, lr: float, k: int | None, rule: Rule) -> np.ndarray:
    """The same step written with a sorted Python list."""
    if not np.any(lr * grad):
        return omega
    v = omega - lr * grad
    if k is not None:
        size = [abs(x) if rule == "magnitude" else x for x in v]
        kept = sorted(range(len(v)), key=lambda i: (-size[i], i))[:k]
        v = np.array([x if i in kept else 0.0 for i, x in enumerate(v)])
    return np.maximum(v, 0.0) if rule == "positive" else v


@settings(max_examples=200, deadline=None)
@given(
    gates,
    st.sampled_from([0.0, 0.1, 5.0]),
    st.none() | st.integers(1, 11),
    st.sampled_from(("signed", "positive", "magnitude")),
)
def test_step_is_sgd_then_projection(pairs, lr: float, k: int | None, rule: Rule) -> None:
    omega, grad = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    stepped = gate_step(omega, grad, lr, k, rule)
    np.testing.assert_array_equal(stepped.numpy(), reference(omega.numpy(), grad.numpy(), lr, k, rule))


def test_result_is_new_detached_and_keeps_the_dtype() -> None:
    omega = torch.ones(3, requires_grad=True)
    for grad in (torch.zeros(3), torch.tensor([0.5, 0.0, -0.5])):
        stepped = gate_step(omega, grad.to(torch.bfloat16), 0.1, 2)
        assert stepped.dtype == torch.float32
        assert not stepped.requires_grad
        assert stepped.data_ptr() != omega.data_ptr()
    assert torch.equal(omega.detach(), torch.ones(3))


@pytest.mark.parametrize("rule", ["signed", "positive", "magnitude"])
def test_nothing_is_projected_when_nothing_moved(rule: Rule) -> None:
    omega = torch.tensor([1.0, 1.0, -1.0, 1.0])
    assert torch.equal(gate_step(omega, torch.zeros(4), 5.0, 2, rule), omega)
    assert torch.equal(gate_step(omega, -torch.zeros(4), 5.0, 1, rule), omega)
    assert torch.equal(gate_step(omega, torch.ones(4), 0.0, 1, rule), omega)


def test_first_choice_is_the_k_smallest_gradients() -> None:
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(36, generator=generator)
    kept = gate_step(torch.ones(36), grad, 5.0, 5).nonzero().flatten().tolist()
    assert kept == sorted(grad.argsort()[:5].tolist())


def test_a_closed_gate_may_come_back() -> None:
    omega = torch.tensor([1.0, 0.0])
    assert gate_step(omega, torch.tensor([0.0, -0.5]), 5.0, 1).tolist() == [0.0, 2.5]


def test_step_reads_nothing_back_to_the_host() -> None:
    # Tensors on "meta" have no data: any .item(), bool() or nonzero() would raise.
    omega, grad = torch.ones(6, device="meta"), torch.ones(6, device="meta")
    for k in (None, 2, 9):
        for rule in ("signed", "positive", "magnitude"):
            assert gate_step(omega, grad, 0.1, k, rule).shape == (6,)


def test_nan_stays_visible() -> None:
    grad = torch.tensor([0.0, float("nan"), 1.0])
    for rule in ("signed", "positive", "magnitude"):
        assert bool(gate_step(torch.ones(3), grad, 1.0, 1, rule).isnan().any())


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 80), st.data(), st.sampled_from(SHAPES))
def test_gradual_k_falls_to_k(total: int, n: int, data: st.DataObject, shape: Shape) -> None:
    k = data.draw(st.integers(1, n))
    ks = [gradual_k(step, total, n, k, shape) for step in range(1, total + 3)]
    assert ks[total - 1 :] == [k] * 3
    assert all(n >= earlier >= later >= k for earlier, later in pairwise(ks))
    assert shape != "constant" or set(ks) == {k}
    if shape == "cubic":
        exact = [n + (k - n) * (1 - (1 - Fraction(step, total)) ** 3) for step in range(1, total + 1)]
        assert all(0 <= got - want < 1 for got, want in zip(ks, exact, strict=False))


def test_halving_follows_the_official_events() -> None:
    # n=60, two events 10 steps apart: 60, then 30 from step 10, then 15 from step 20.
    ks = [gradual_k(step, 20, 60, 15, "halving") for step in range(1, 21)]
    assert ks == [60] * 9 + [30] * 10 + [15]
    assert [gradual_k(step, 6, 36, 5, "halving") for step in range(1, 7)] == [36, 18, 18, 9, 9, 5]
