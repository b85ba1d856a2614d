"""Scores against autograd and finite differences; the coverage choice against every subset."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightlora.core.importance import coverage, credit, one_shot
from weightlora.errors import ConfigError

SCALE = 4.0


class Toy:
    """One gated linear layer in float64 with a curved loss."""

    def __init__(self, *, zero_B: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.W = torch.randn(5, 7, generator=generator, dtype=torch.float64) / 3
        self.A = torch.randn(2, 7, generator=generator, dtype=torch.float64) / 3
        self.B = torch.randn(5, 2, generator=generator, dtype=torch.float64) * (0 if zero_B else 1 / 3)
        self.x = torch.randn(11, 7, generator=generator, dtype=torch.float64)

    def loss(self, omega: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self.dense_loss(self.W + omega * SCALE * B @ A)

    def dense_loss(self, W: Tensor) -> Tensor:
        return (self.x @ W.T).tanh().square().sum()

    def dense_gradient(self, omega: float) -> Tensor:
        W = (self.W + omega * SCALE * self.B @ self.A).requires_grad_()
        return torch.autograd.grad(self.dense_loss(W), W)[0]


def test_one_shot_is_the_product_after_a_unit_step() -> None:
    toy = Toy(zero_B=True)
    A, B = toy.A.clone().requires_grad_(), toy.B.clone().requires_grad_()
    grad_A, grad_B = torch.autograd.grad(toy.loss(torch.ones(()), A, B), (A, B))
    G = toy.dense_gradient(1.0)
    torch.testing.assert_close(grad_B, SCALE * G @ toy.A.T)
    first_adapter = SCALE * -grad_B @ toy.A
    assert float(one_shot(grad_B)) == pytest.approx(-float((G * first_adapter).sum()), rel=1e-12)
    assert float(one_shot(grad_B)) > 0.1
    assert torch.equal(grad_A, torch.zeros_like(grad_A))
    assert float(credit([grad_A, grad_B], [-grad_A, -grad_B])) == pytest.approx(float(one_shot(grad_B)), rel=1e-12)


def test_credit_is_the_first_order_decrease() -> None:
    toy = Toy()
    A, B = toy.A.clone().requires_grad_(), toy.B.clone().requires_grad_()
    one = torch.ones(())
    loss = toy.loss(one, A, B)
    grads = torch.autograd.grad(loss, (A, B))
    deltas = [1e-6 * torch.ones_like(A), -2e-6 * torch.ones_like(B)]
    decrease = loss.detach() - toy.loss(one, toy.A + deltas[0], toy.B + deltas[1])
    assert float(credit(grads, deltas)) == pytest.approx(float(decrease), rel=1e-4)
    downhill = [-1e-3 * g for g in grads]
    assert float(credit(grads, downhill)) > 0


def test_credit_types() -> None:
    low = torch.full((300,), 1.0, dtype=torch.bfloat16)
    assert float(credit([low], [-low])) == 300  # bfloat16 itself would stop counting at 256
    assert credit([low], [-low]).dtype == torch.float32
    assert credit([low, low.double()], [low, low]).dtype == torch.float64


def value(chosen: tuple[int, ...] | list[int], scores: list[float], groups: list[int]) -> float:
    return sum(math.sqrt(sum(max(scores[i], 0.0) for i in chosen if groups[i] == group)) for group in {*groups})


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1, 10), st.integers(0, 3)), min_size=1, max_size=9),
    st.data(),
)
def test_coverage_is_near_the_optimum(pairs: list[tuple[float, int]], data: st.DataObject) -> None:
    scores, groups = [s for s, _ in pairs], [g for _, g in pairs]
    k = data.draw(st.integers(1, len(pairs)))
    chosen = coverage(scores, groups, k)
    best = max(value(subset, scores, groups) for subset in combinations(range(len(pairs)), k))
    assert chosen == sorted(set(chosen))
    assert len(chosen) == k
    assert value(chosen, scores, groups) >= (1 - 1 / math.e) * best - 1e-9
    single = coverage(scores, [0] * len(scores), k)  # one group: plain top k
    assert value(single, scores, [0] * len(scores)) == pytest.approx(
        math.sqrt(sum(sorted((max(s, 0.0) for s in scores), reverse=True)[:k]))
    )


def test_coverage_spreads_over_layers_where_top_k_piles_up() -> None:
    # Six layers, credit highest in the two FFN linears and decaying from the bottom to the top layer:
    # (query, key, value, attention output, FFN in, FFN out).
    kinds = [0.02, 0.01, 0.25, 0.30, 1.00, 0.80]
    scores = [0.85**layer * kind for layer in range(6) for kind in kinds]
    groups = [layer for layer in range(6) for _ in kinds]
    plain = sorted(sorted(range(36), key=lambda i: -scores[i])[:5])
    assert plain == [4, 5, 10, 11, 16]  # the bottom two layers take four of five
    assert coverage(scores, groups, 5) == [4, 10, 16, 22, 28]  # FFN in of layers 0-4
    best = max(combinations(range(36), 5), key=lambda subset: value(subset, scores, groups))
    assert list(best) == [4, 10, 16, 22, 28]


def test_coverage_ties_and_refusals() -> None:
    assert coverage([1.0] * 6, [0, 0, 1, 1, 2, 2], 4) == [0, 1, 2, 4]
    assert coverage([5.0, 4.0, 1.2], [0, 0, 1], 2) == [0, 2]  # 3 - sqrt(5) is less than sqrt(1.2)
    assert coverage([-1.0, 0.0, -5.0], [0, 1, 2], 2) == [0, 1]
    assert coverage([-1.0, 0.0, 2.0], [0, 0, 0], 1) == [2]
    with pytest.raises(ConfigError, match=r"scores at \[1\]"):
        coverage([1.0, float("nan")], [0, 0], 1)
