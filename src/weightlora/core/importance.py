"""What an adapter is worth: scores from gradients, and a choice that spreads over groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from weightlora.errors import ConfigError


def credit(grads: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    r"""Decrease of the loss that an update bought, to first order: `-sum_j <grad_j, delta_j>`.

    Positive when the update went downhill. Summed over steps it is an adapter's credit; the gradients must be those
    taken before the update.

    Args:
        grads: gradients of an adapter's tensors, any shapes.
        deltas: what the optimizer added to the same tensors, same shapes and order.

    Returns:
        A scalar tensor on the device of the gradients, float64 if any input is, else float32.

    Source: first-order Taylor expansion of the loss; not in the paper.

    >>> import torch
    >>> g = torch.tensor([1.0, -2.0])
    >>> credit([g], [-0.1 * g])
    tensor(0.5000)
    """
    parts = []
    for grad, delta in zip(grads, deltas, strict=True):
        work = _work_dtype(grad, delta)
        parts.append(-(grad.to(work) * delta.to(work)).sum())
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def trapezoid(own: Tensor, after: Tensor) -> Tensor:
    r"""Decrease of the loss along an update, by the gradients at both ends: `-<(g + h) / 2, delta>`.

    :func:`credit` with the gradient g from before the update over-counts: it holds its batch's noise, which the update
    followed. With h from after it, on the next batch, it is unbiased but misses the curvature. The mean of both is the
    line integral of the loss up to third order in the update; on one batch the parts of all adapters add up to the
    measured decrease.

    Args:
        own: credit with the gradients from before the update, any shape.
        after: credit of the same update with those from after it, same shape.

    Returns:
        A tensor of that shape.

    Source: Loss Change Allocation (Lan et al. 2019, arXiv 1909.01440). Departure: two points in place of Runge-Kutta.

    >>> import torch
    >>> x, delta = torch.tensor([2.0]), torch.tensor([-1.0])  # of x ** 2 from 2 to 1
    >>> trapezoid(credit([2 * x], [delta]), credit([2 * (x + delta)], [delta]))
    tensor(3.)
    """
    return (own + after) / 2


def cross_energy(total: Tensor, energy: Tensor) -> Tensor:
    r"""Gradient energy on which batches agree: `sum_(s != t) <g_s, g_t> = ||sum_t g_t||^2 - sum_t ||g_t||^2`.

    Batch noise, independent between batches, is 0 in expectation here, and T times itself in `||sum_t g_t||^2`.

    Args:
        total: sum of the gradients over batches, any shape.
        energy: sum of their squared norms, a scalar.

    Returns:
        A scalar tensor, float64 if any input is, else float32; negative where batches disagree.

    >>> import torch
    >>> cross_energy(torch.tensor([1.0, 1.0]), torch.tensor(2.0))  # two gradients at a right angle
    tensor(0.)
    """
    work = _work_dtype(total, energy)
    return total.to(work).square().sum() - energy.to(work)


def gate_points(count: int) -> tuple[list[float], list[float]]:
    r"""Where gates are read, and how readings weigh, for :func:`integrated`: Gauss and Legendre's rule on (0, 1).

    Args:
        count: number of points, at least 1; polynomials up to degree 2 count - 1 are integrated exactly.

    Returns:
        Points in (0, 1), rising, and weights, which add up to 1.

    >>> gate_points(1)
    ([0.5], [1.0])
    """
    # Golub and Welsch: the points are the eigenvalues of a tridiagonal matrix.
    k = torch.arange(1, count, dtype=torch.float64)
    beside = k / (4 * k**2 - 1).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return ((points + 1) / 2).tolist(), vectors[0].square().tolist()


def integrated(gradients: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    r"""What each adapter bought, with all gates raised together from 0 to 1: `a_i = -sum_j w_j dL/domega_i(t_j)`.

    An approximation of `-int_0^1 dL/domega_i(t 1) dt`. By the chain rule the a_i add up to `L(0) - L(1)`: the loss
    without adapters less the loss with all. It gives omega's gradient a unit: nats.

    Args:
        gradients: dL/domega at each of the points, (n,) each, with all gates at that point.
        weights: of the points (see :func:`gate_points`).

    Returns:
        (n,), float64.

    Source: Aumann-Shapley values; integrated gradients (Sundararajan et al. 2017) with the paper's gates as inputs.

    >>> import torch
    >>> points, weights = gate_points(2)
    >>> integrated([torch.tensor([2 * t, -1]) for t in points], weights).round(decimals=6)  # of omega_1 ** 2 - omega_2
    tensor([-1.,  1.], dtype=torch.float64)
    """
    stacked = torch.stack([gradient.double() for gradient in gradients])
    return -(torch.tensor(weights, dtype=torch.float64, device=stacked.device) @ stacked)


def holding(scores: Sequence[float], share: float) -> list[int]:
    r"""The smallest set that holds a share of the total score; scores at or below zero hold nothing.

    Args:
        scores: one finite score for each adapter.
        share: in (0, 1].

    Returns:
        Sorted indices, at least one; of equal scores the lowest index first.

    Raises:
        ConfigError: a score is not finite, or none is above zero.

    >>> holding([5.0, 1.0, 3.0, 1.0], 0.8), holding([0.7, 0.2, 0.1], 0.9)
    ([0, 2], [0, 1])
    """
    _check_finite(scores)
    if not any(score > 0 for score in scores):
        raise ConfigError(
            "no score is above zero, so there is no share of them to keep; train longer before the choice"
        )
    # As shares are written, not as binary numbers add up: 0.7 and 0.2 hold 0.9.
    return smallest_prefix([max(score, 0.0) for score in scores], share * (1 - 1e-12))


def smallest_prefix(scores: Sequence[float], threshold: float) -> list[int]:
    r"""Indices of the largest scores that together reach a share of the sum.

    With scores sorted in descending order, the smallest k with `sum_{i <= k} I_i >= threshold`, where
    `I_i = g_i / sum_j g_j`. Sums are exact and the threshold is the decimal as written, so at threshold 1 every score
    above 0 is in. Of equal scores the lowest index comes first.

    Args:
        scores: g, finite and not negative.
        threshold: in (0, 1].

    Returns:
        Sorted indices; none where every score is 0.

    Raises:
        ConfigError: a score is negative or not finite.

    Source: LoRA-drop, stage 2.

    >>> smallest_prefix([1.0, 6.0, 0.0, 3.0], 0.9), smallest_prefix([1.0, 6.0, 0.0, 3.0], 1.0)
    ([1, 3], [0, 1, 3])
    """
    bad = [i for i, score in enumerate(scores) if not (math.isfinite(score) and score >= 0)]
    if bad:
        raise ConfigError(f"scores at {bad} are negative or not finite; training diverged before the choice")
    exact = [Fraction(score) for score in scores]
    wanted, reached = Fraction(repr(float(threshold))) * sum(exact), Fraction(0)
    chosen: list[int] = []
    for index in sorted(range(len(exact)), key=lambda i: (-exact[i], i)):
        if reached >= wanted:
            break
        reached += exact[index]
        chosen.append(index)
    return sorted(chosen)


def one_shot(grad_B: Tensor) -> Tensor:
    r"""Score of an adapter before any training: `||dL/dB||_F^2` at B = 0.

    With G the dense gradient, `dL/dB = s G A^T`. One SGD step of learning rate 1 from B = 0 gives `B = -dL/dB`, and
    the product of the dense gradient with that first adapter is `<G, s B A> = <s G A^T, B> = -||dL/dB||_F^2`. So this
    is the absolute gradient-adapter scalar product of the paper's Figure 2 after one unit step, and it is also the
    :func:`credit` of that step (A does not move: its gradient is zero at B = 0).

    Args:
        grad_B: dL/dB of shape (d_out, r), taken at B = 0, averaged over the batches wanted before the call.

    Returns:
        A scalar tensor, float64 if the input is, else float32.

    Source: paper section 3.1, Figure 2. Departure: the paper trains first and uses the full gradient.

    >>> import torch
    >>> one_shot(torch.tensor([[3.0], [4.0]]))
    tensor(25.)
    """
    return grad_B.to(_work_dtype(grad_B)).square().sum()


def coverage(scores: Sequence[float], groups: Sequence[int], k: int) -> list[int]:
    r"""Choose k adapters with high scores, spread over groups (layers).

    Greedy maximiser of `F(S) = sum_g sqrt(sum_{i in S, group i = g} max(scores_i, 0))` over `|S| = k`. F is monotone
    and submodular, so greedy reaches at least `1 - 1/e` of the optimum (Nemhauser, Wolsey, Fisher 1978). Of equal gains
    the lowest index wins; scores at or below zero gain nothing and are taken last.

    Args:
        scores: one finite score for each adapter.
        groups: the group of each adapter, for example its layer.
        k: how many to choose, in 1..n.

    Returns:
        Sorted indices, exactly k.

    Raises:
        ConfigError: a score is not finite.

    >>> coverage([4.0, 3.0, 2.5, 0.1], [0, 0, 1, 1], 2)  # plain top 2 would take both of group 0
    [0, 2]
    """
    n = len(scores)
    _check_finite(scores)
    useful = [max(float(score), 0.0) for score in scores]
    covered = dict.fromkeys(groups, 0.0)
    chosen: set[int] = set()
    for _ in range(k):
        rest = (i for i in range(n) if i not in chosen)
        best = max(rest, key=lambda i: (_gain(covered[groups[i]], useful[i]), -i))
        chosen.add(best)
        covered[groups[best]] += useful[best]
    return sorted(chosen)


def _check_finite(scores: Sequence[float]) -> None:
    bad = [i for i, score in enumerate(scores) if not math.isfinite(score)]
    if bad:
        raise ConfigError(f"scores at {bad} are not finite; training diverged before the choice")


def _gain(covered: float, score: float) -> float:
    """sqrt(covered + score) - sqrt(covered), without the cancellation of that difference."""
    return score / (math.sqrt(covered + score) + math.sqrt(covered)) if score > 0 else 0.0


def _work_dtype(*tensors: Tensor) -> torch.dtype:
    work = torch.float32
    for tensor in tensors:
        work = torch.promote_types(work, tensor.dtype)
    return work
