"""The adapter path with its backward written out: keeps the input and the rank-r product, and the gate is free."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _compute_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """The dtype PEFT would multiply in: autocast's where it is on, else the adapter's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else A.dtype


class _AdapterPath(torch.autograd.Function):
    """``y = result + s w (drop(x) A^T) B^T`` for 2-D ``x`` and ``result``; ``mask`` is the kept entries, or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor,
        A: Tensor,
        B: Tensor,
        gate: Tensor | None,
        scale: float,
        mask: Tensor | None,
        keep: float,
    ) -> Tensor:
        dtype = _compute_dtype(x, A)
        dropped = x.to(dtype)
        if mask is not None:
            dropped = dropped * mask * (1.0 / keep)
        h = dropped @ A.to(dtype).T
        # The gate multiplies the small factor, so no extra pass over the output and no host synchronisation.
        left = B.to(dtype) * scale if gate is None else (B * (scale * gate.to(B.device))).to(dtype)
        ctx.save_for_backward(x, A, B, gate, h, mask)
        ctx.scale, ctx.keep, ctx.dtype = scale, keep, dtype
        if result.dtype == dtype:
            return torch.addmm(result, h, left.T)
        return result + h @ left.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, gate, h, mask = ctx.saved_tensors
        dtype, scale = ctx.dtype, ctx.scale
        need_x, need_result, need_A, need_B, need_gate = ctx.needs_input_grad[:5]
        grad = g.to(dtype)
        exact = torch.promote_types(dtype, torch.float32)
        strength = scale if gate is None else (scale * gate.to(B.device)).to(exact)
        grad_x = grad_A = grad_B = grad_gate = None
        gB = grad @ B.to(dtype)
        if need_gate:
            grad_gate = (scale * (gB.to(exact) * h.to(exact)).sum()).to(device=gate.device, dtype=gate.dtype)
        if need_B:
            grad_B = ((grad.T @ h) * strength).to(B.dtype)
        if need_A or need_x:
            gh = (gB * strength).to(dtype)
            if need_A:
                dropped = x.to(dtype)
                if mask is not None:
                    dropped = dropped * mask * (1.0 / ctx.keep)
                grad_A = (gh.T @ dropped).to(A.dtype)
            if need_x:
                grad_x = gh @ A.to(dtype)
                if mask is not None:
                    grad_x = grad_x * mask * (1.0 / ctx.keep)
                grad_x = grad_x.to(x.dtype)
        return grad_x, (g if need_result else None), grad_A, grad_B, grad_gate, None, None, None


def adapter_path(
    x: Tensor, result: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """Add one gated LoRA update to a linear layer's output, keeping only ``x`` and ``h = drop(x) A^T`` for backward.

    With upstream gradient ``g`` and ``gB = g B``:
    ``dB = s w g^T h``, ``dA = s w gB^T drop(x)``, ``dx = s w gB A``, ``dw = s sum(gB * h)``.
    Each product is needed for plain LoRA already, so the gate costs nothing, and its gradient is right at ``w = 0`` too.

    Arguments, result: as :func:`weightlora.ops.reference.adapter_path`; ``dropout`` draws its own mask (one byte an entry).
    The input is kept in its own dtype: float32 adapters on a bfloat16 base keep no float32 copy.

    Source: paper, equation (3); the backward is ours. Departs from PEFT's forward in rounding only (``addmm``).

    >>> import torch
    >>> x, W = torch.ones(1, 3), torch.zeros(1, 2)
    >>> adapter_path(x, W, torch.ones(1, 3), torch.ones(2, 1), torch.tensor(0.5), 2.0)
    tensor([[3., 3.]])
    """
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout) if dropout > 0.0 else None
    flat_x = x.reshape(-1, x.shape[-1])
    flat_result = result.reshape(-1, result.shape[-1])
    flat_mask = None if mask is None else mask.reshape(flat_x.shape)
    out = _AdapterPath.apply(flat_x, flat_result, A, B, gate, scale, flat_mask, 1.0 - dropout)
    return out.reshape(result.shape)  # type: ignore[no-any-return]
