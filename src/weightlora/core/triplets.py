"""Ranks as triplets of a column, a number and a row: AdaLoRA's importance, budget and orthogonality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def smooth_sensitivity(
    value: Tensor, grad: Tensor, mean: Tensor, spread: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    r"""One step of the smoothed sensitivity of every entry and of its uncertainty.

    ``I = |p g|``; ``Ibar <- b1 Ibar + (1 - b1) I``; ``U <- b2 U + (1 - b2) |I - Ibar|`` with the new Ibar. The score
    of an entry is ``Ibar * U``.

    Args:
        value, grad: p and its gradient g, any shape.
        mean, spread: Ibar and U so far, same shape, float32; zeros at the start.
        beta1, beta2: in [0, 1).

    Returns:
        The new ``(Ibar, U)``.

    Source: AdaLoRA (Zhang et al. 2023), equations 9 to 11.

    >>> import torch
    >>> mean, spread = smooth_sensitivity(torch.tensor([2.0]), torch.tensor([-1.0]), *torch.zeros(2, 1), 0.5, 0.5)
    >>> mean, spread
    (tensor([1.]), tensor([0.5000]))
    """
    sensitivity = (value.to(mean.dtype) * grad.to(mean.dtype)).abs()
    mean = beta1 * mean + (1 - beta1) * sensitivity
    return mean, beta2 * spread + (1 - beta2) * (sensitivity - mean).abs()


def triplet_scores(gates: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Importance of every rank: ``score(E_i) + mean_j score(Q_ij) + mean_j score(P_ji)``.

    Args:
        gates: ``(r,)`` entry scores of E.
        rows: ``(r, d_in)`` of Q (LoRA's A).
        columns: ``(d_out, r)`` of P (LoRA's B).

    Returns:
        ``(r,)``.

    Source: AdaLoRA, equation 7.

    >>> import torch
    >>> triplet_scores(torch.tensor([1.0]), torch.tensor([[2.0, 4.0]]), torch.tensor([[1.0], [3.0], [5.0]]))
    tensor([7.])
    """
    return gates + rows.mean(1) + columns.mean(0)


def cubic_budget(step: int, start: int, target: int, tinit: int, last: int) -> int:
    """Total rank allowed after `step`: `start` up to tinit, `target` from `last` on, a cubic in between.

    ``b(t) = int(target + (start - target) (1 - (t - tinit) / (last - tinit))^3)``: fast first, slow last.

    Args:
        step: counts from 1.
        start, target: total ranks, ``start >= target``.
        tinit: last step with the whole budget.
        last: first step with the final one, ``M - tfinal``; above tinit.

    Source: AdaLoRA, equation 12.

    >>> [cubic_budget(t, 24, 16, 10, 20) for t in (10, 11, 15, 19, 20, 30)]
    [24, 21, 17, 16, 16, 16]
    """
    if step <= tinit:
        return start
    if step >= last:
        return target
    return int((start - target) * (1 - (step - tinit) / (last - tinit)) ** 3 + target)


def above_smallest(scores: Tensor, count: int) -> Tensor:
    """Which entries lie above the `count`-th smallest; all for 0. Entries that tie with it fall too.

    >>> import torch
    >>> above_smallest(torch.tensor([3.0, 1.0, 2.0, 1.0]), 1)
    tensor([ True, False,  True, False])
    """
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores > torch.kthvalue(scores, count).values


def orthogonality(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """How far factors are from orthonormal: mean over all A and B of ``||A A^T - I||_F`` and ``||B^T B - I||_F``.

    Args:
        factors: ``(A (r, d_in), B (d_out, r))``.

    Returns:
        A scalar; its gradient at exact orthonormality is 0.

    Source: AdaLoRA, equation 4. Departs from its text (norm squared) as its released code does.

    >>> import torch
    >>> orthogonality([(torch.eye(2, 3), 2 * torch.eye(2))])  # (0 + sqrt(3^2 + 3^2)) / 2
    tensor(2.1213)
    """
    grams = [gram for A, B in factors for gram in (A @ A.T, B.T @ B)]
    norms = [torch.linalg.matrix_norm(g - torch.eye(len(g), dtype=g.dtype, device=g.device)) for g in grams]
    return torch.stack([norm.float() if norm.dtype != torch.float64 else norm for norm in norms]).mean()
