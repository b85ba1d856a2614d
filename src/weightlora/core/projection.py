"""Projections onto vectors with at most k non-zeros: the constraint ||omega||_0 <= K of the paper's equation (4)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from weightlora.errors import WeightLoRAError

Rule = Literal["signed", "positive", "magnitude"]

_SHOWN = 16  # NaN positions written out in an error line


def top_k(values: Tensor, k: int, rule: Rule = "signed") -> Tensor:
    r"""Keep at most k entries of a vector and set the others to zero.

    With `v` the given vector:

    - ``"magnitude"``: the Euclidean projection, `argmin_{||z||_0 <= k} ||z - v||^2`; keeps the k largest `|v_i|`.
    - ``"positive"``: the Euclidean projection onto the non-negative sparse vectors,
      `argmin_{z >= 0, ||z||_0 <= k} ||z - v||^2`; keeps the k largest `v_i` among those above zero.
    - ``"signed"``: `z_i = v_i` on `S` and 0 elsewhere, `S = argmax_{|S| = k} sum_{i in S} v_i`; keeps the k largest
      signed values whatever their sign. Once a negative entry is kept it is no nearest point, and a second
      application drops that entry for a zero; its `S` is the support of the Euclidean projection of `v + c` for every
      constant `c > -min(v)`.

    Of equal entries the lowest index wins, on every device. With `k >= n` nothing is dropped ("positive" still
    sets negative entries to zero).

    Args:
        values: vector of shape (n,), any real dtype and device; it is not changed.
        k: largest number of non-zeros, at least 1.
        rule: which problem to solve, see above.

    Returns:
        A new tensor of shape (n,) with the dtype and device of `values`. A NaN counts as largest and survives: the
        host is never asked.

    Source: paper section 3.3 ("we retain only the Top-K coordinates and nullify the others"); "signed" is what the
    authors' optimizer does, "positive" is the paper's forward, which uses an adapter only where omega_i > 0.

    >>> import torch
    >>> v = torch.tensor([0.5, -3.0, 0.5, 1.0])
    >>> top_k(v, 2)
    tensor([0.5000, 0.0000, 0.0000, 1.0000])
    >>> top_k(v, 2, "magnitude")
    tensor([ 0., -3.,  0.,  1.])
    >>> top_k(v, 4, "positive")
    tensor([0.5000, 0.0000, 0.5000, 1.0000])
    """
    return torch.where(_keep(values, k, rule), values, torch.zeros_like(values))


def support(values: Tensor, k: int, rule: Rule = "signed") -> list[int]:
    """Sorted indices that :func:`top_k` keeps.

    "signed" and "magnitude" always keep min(k, n) entries, be they zero; "positive" keeps only entries above zero, so
    it may return fewer than k and even none.

    Args:
        values: vector of shape (n,), any real dtype and device.
        k: largest number of indices, at least 1.
        rule: as in :func:`top_k`.

    Raises:
        WeightLoRAError: `values` holds NaN; the line names the indices.

    >>> import torch
    >>> support(torch.tensor([0.1, 0.9, -0.2, 0.9]), 2)
    [1, 3]
    >>> support(torch.tensor([-1.0, -2.0, 3.0]), 2, "positive")
    [2]
    """
    bad = torch.isnan(values).nonzero().flatten().tolist()
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise WeightLoRAError(
            f"the values to choose from are NaN at {bad[:_SHOWN]}{more}; training diverged before the choice: "
            "lower the learning rate (of the gates first)"
        )
    return [int(i) for i in _keep(values, k, rule).nonzero().flatten().tolist()]


def _keep(values: Tensor, k: int, rule: Rule) -> Tensor:
    """Boolean mask (n,) of the kept entries."""
    # Adding 0 turns -0.0 into 0.0: a sort by bit pattern would tell the two apart and break the tie rule.
    key = (values.abs() if rule == "magnitude" else values) + 0
    kept = torch.sort(key, descending=True, stable=True).indices[:k]
    mask = torch.zeros_like(values, dtype=torch.bool).index_fill(0, kept, True)
    return mask & ~(values <= 0) if rule == "positive" else mask
