"""The adapter path, readable: the formula and nothing else. The fast engine is tested against this one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def adapter_path(
    x: Tensor, result: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """Add one gated LoRA update to a linear layer's output, exactly as PEFT's own forward does.

    ``y = result + (scale * gate) * (drop(x) A^T) B^T``

    Args:
        x: input of the layer, ``(..., d_in)``.
        result: output of the frozen base layer, ``(..., d_out)``.
        A: ``(r, d_in)``; B: ``(d_out, r)``.
        gate: scalar ``omega_i`` (float32), or None for an ungated adapter.
        scale: ``s``, alpha / r at creation.
        dropout: probability applied to ``x`` (0 outside training).

    Returns:
        ``(..., d_out)``. With ``gate == 1`` the result is bit-equal to PEFT 0.21's forward: same operations, same
        order, same random numbers.

    Source: paper, equation (3). Every intermediate is kept by autograd, the ``(..., d_out)`` update included.

    >>> import torch
    >>> x, W = torch.ones(1, 3), torch.zeros(1, 2)
    >>> adapter_path(x, W, torch.ones(1, 3), torch.ones(2, 1), torch.tensor(0.5), 2.0)
    tensor([[3., 3.]])
    """
    x = x.to(A.dtype)
    update = F.linear(F.linear(F.dropout(x, dropout, training=dropout > 0.0), A), B) * scale
    return result + (update if gate is None else update * gate.to(device=update.device, dtype=update.dtype))
