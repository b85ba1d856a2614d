"""Gates of whole transformer blocks, as a softmax over one number per block."""

from __future__ import annotations

import torch
from torch import Tensor


def block_gates(alpha: Tensor) -> Tensor:
    r"""`L softmax(alpha)`: one gate per block, mean 1, all 1 where alpha is all equal.

    Args:
        alpha: (L,), float.

    Returns:
        (L,), same dtype, differentiable.

    Source: Flexora.

    >>> block_gates(torch.zeros(3))
    tensor([1., 1., 1.])
    """
    # Not L * softmax(alpha): L * (1 / L) is not always 1, and at equal alphas gates have to be exactly that.
    weights = torch.exp(alpha - alpha.detach().max())
    return weights / weights.mean()
