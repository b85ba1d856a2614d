"""Low-rank pairs read off a weight: its smallest singular directions, its best weighted approximation."""

from __future__ import annotations

import torch
from torch import Tensor

from weightlora.errors import ConfigError


def minor_pair(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """The part of a weight along its `rank` smallest singular values: ``s B A = U_m S_m V_m^T``.

    ``B = U_m sqrt(S_m / s)``, ``A = sqrt(S_m / s) V_m^T``; computed in float32 or, for a float64 weight, in float64.

    Args:
        W: weight, shape (d_out, d_in).
        rank: r, from 1 to min(d_out, d_in).
        scale: s, above 0.

    Returns:
        ``A (r, d_in)`` and ``B (d_out, r)``.

    Source: MiLoRA, Wang et al. 2024.

    >>> A, B = minor_pair(torch.diag(torch.tensor([3.0, 1.0])), 1, 2.0)
    >>> torch.allclose(2.0 * B @ A, torch.diag(torch.tensor([0.0, 1.0])))
    True
    """
    U, S, Vh = torch.linalg.svd(_wide(W), full_matrices=False)
    root = (S[-rank:] / scale).sqrt()
    return root.unsqueeze(1) * Vh[-rank:], U[:, -rank:] * root


def major_pair(W: Tensor, rank: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The pair of `rank` that comes closest to a weight, ``min ||(W - B A) S||_F`` with ``S = diag(weights)``.

    With the SVD ``W S = U D V^T``: ``B = U_r D_r``, ``A = V_r^T S^-1``; computed in float32 (float64 for a float64 W).

    Args:
        W: weight, shape (d_out, d_in).
        rank: r, from 1 to min(d_out, d_in).
        weights: how much each input counts, shape (d_in,), such as its mean magnitude; not negative. What is below
            1e-6 of the largest is raised to that. None: all count alike.

    Returns:
        ``A (r, d_in)`` and ``B (d_out, r)``.

    Raises:
        ConfigError: `weights` are not finite, negative or all zero.

    Source: NoRA, Lin et al. 2024.

    >>> A, B = major_pair(torch.diag(torch.tensor([3.0, 1.0])), 1, torch.tensor([1.0, 4.0]))
    >>> torch.allclose(B @ A, torch.diag(torch.tensor([0.0, 1.0])))
    True
    """
    W = _wide(W)
    S = torch.ones_like(W[0]) if weights is None else weights.to(W)
    if not bool(torch.isfinite(S).all()) or bool((S < 0).any()) or not bool(S.any()):
        raise ConfigError(f"weights must be {W.shape[1]} finite numbers, none negative and not all zero")
    S = S.clamp_min(1e-6 * float(S.max()))
    U, D, Vh = torch.linalg.svd(W * S, full_matrices=False)
    return Vh[:rank] / S, U[:, :rank] * D[:rank]


def _wide(W: Tensor) -> Tensor:
    return W if W.dtype == torch.float64 else W.float()
