"""Average low-rank updates and give the average back in any rank, without forming one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def svd_merge(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], rank: int) -> tuple[Tensor, Tensor]:
    r"""Best approximation of ``sum_i w_i B_i A_i`` in a given rank: ``B = U_r S_r``, ``A = V_r^T``.

    The factors are stacked, each stack is reduced by QR, and the SVD is one of the small core in between: nothing of
    the size ``d_out x d_in`` appears.

    Args:
        factors: ``(A (r_i, d_in), B (d_out, r_i))`` of each update; ranks may differ.
        weights: one for each, summing to 1.
        rank: of the result; where the sum has a lower one, the last rows and columns are zero.

    Returns:
        ``(A (rank, d_in), B (d_out, rank))`` float64, A with orthonormal rows (or zero ones).

    Source: Bai et al. 2024 (FlexLoRA), redistribution by SVD.

    >>> import torch
    >>> A, B = svd_merge([(torch.eye(2), torch.eye(2)), (torch.eye(2), 3 * torch.eye(2))], [0.5, 0.5], 2)
    >>> torch.allclose(B @ A, 2 * torch.eye(2, dtype=torch.float64))
    True
    """
    left = torch.cat([w * B.double() for w, (_, B) in zip(weights, factors, strict=True)], dim=1)
    right = torch.cat([A.double() for A, _ in factors])
    left_q, left_r = torch.linalg.qr(left)
    right_q, right_r = torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(left_r @ right_r.T, full_matrices=False)
    known = min(rank, S.numel())
    A, B = right.new_zeros(rank, right.shape[1]), left.new_zeros(left.shape[0], rank)
    A[:known] = (right_q @ Vh[:known].T).T
    B[:, :known] = left_q @ (U[:, :known] * S[:known])
    return A, B
