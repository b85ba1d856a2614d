"""Ranks weighed by the size of what they add, without gradients: Dynamic LoRA's share, schedule and evenness."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def component_shares(A: Tensor, B: Tensor, c: Tensor) -> Tensor:
    r"""How large each rank is in its adapter: ``||c_i b_i a_i||_F / (||B diag(c) A||_F + 1e-8)``.

    The numerator is ``|c_i| ||b_i|| ||a_i||`` and the denominator's square ``sum (c c^T * B^T B * A A^T)``, so nothing
    of the size of W is formed. PEFT's scale cancels.

    Args:
        A: ``(r, d_in)``.
        B: ``(d_out, r)``.
        c: ``(r,)``.

    Returns:
        ``(r,)``, float64 if any input is, else float32.

    Source: Dynamic LoRA (Mao et al. 2024).

    >>> import torch
    >>> component_shares(torch.eye(2), torch.eye(2), torch.tensor([3.0, -4.0]))
    tensor([0.6000, 0.8000])
    """
    work = torch.float64 if torch.float64 in (A.dtype, B.dtype, c.dtype) else torch.float32
    A, B, c = A.to(work), B.to(work), c.to(work)
    whole = (torch.outer(c, c) * (B.T @ B) * (A @ A.T)).sum().clamp_min(0.0).sqrt()
    shares: Tensor = c.abs() * B.norm(dim=0) * A.norm(dim=1) / (whole + 1e-8)
    return shares


def rising_cuts(step: int, horizon: int, start: int, target: int) -> int:
    """How many ranks are off `step` steps into the pruning: ``int((start - target) (p / M_p)^3)``, at least 1.

    Slow first, fast last. 0 where there is nothing to take away.

    Args:
        step: p, in 0..M_p.
        horizon: M_p.
        start, target: total ranks, ``start >= target``.

    Source: Dynamic LoRA.

    >>> [rising_cuts(p, 100, 36, 20) for p in (0, 50, 75, 100)]
    [1, 2, 6, 16]
    """
    return min(start - target, max(1, int((start - target) * (step / horizon) ** 3)))


def unevenness(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """How unevenly factors spread over their entries: variance of every row of A and every column of B, mean over all.

    Args:
        factors: ``(A (r, d_in), B (d_out, r))``, at least two entries in each row and column.

    Returns:
        A scalar: the sum of (unbiased) variances over the number of rows and columns.

    Source: Dynamic LoRA, its regulariser "DEM".

    >>> import torch
    >>> unevenness([(torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0], [5.0]]))])  # (2 + 0) / 2
    tensor(1.)
    """
    return torch.cat([v for A, B in factors for v in (A.var(dim=1), B.var(dim=0))]).mean()
