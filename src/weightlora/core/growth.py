"""Growing an adapter's rank without changing its value B @ A (WeightLoRA+, paper section 3.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weightlora.errors import AdapterError, ConfigError

Growth = Literal["gaussian", "qr"]
Noise = Literal["normal", "uniform"]

_LORA_ROW_NORM = 1 / math.sqrt(3)  # of LoRA's initial A: d_in entries of variance 1 / (3 d_in)


@dataclass(frozen=True, kw_only=True, eq=False)
class Grown:
    r"""Factors of a higher rank and the same product.

    Fields:
        A: (r_new, d_in), dtype and device of the old A.
        B: (d_out, r_new), dtype and device of the old B.
        mix: None after "gaussian", where the old rows and columns are still there, in place. After "qr" the (r, r)
            upper triangle `R` in float32 at least: `A_old = R^T A[:r]` and `B[:, :r] = B_old R^T`. Gradients, and so
            first moments, of the first r rows and columns follow as `R dA` and `dB R^{-1}`.
    """

    A: Tensor
    B: Tensor
    mix: Tensor | None


def grow(
    A: Tensor,
    B: Tensor,
    r_new: int,
    mode: Growth = "gaussian",
    *,
    generator: torch.Generator,
    noise: Noise = "normal",
    orthonormal: bool = True,
) -> Grown:
    r"""Raise the rank of one adapter to r_new; `B_new @ A_new == B @ A`.

    With N a random block of (r_new - r, d_in):

    - ``"gaussian"``: `A_new = [A; N]`, `B_new = [B, 0]`. Each row of a normal N is scaled to the mean norm of the rows
      of A (1/sqrt(3), the norm LoRA starts with, when A is zero).
    - ``"qr"``: `A^T = Q R` (reduced), `A_new = [Q^T; N - (N Q) Q^T]`, `B_new = [B R^T, 0]`, in O(d_in r_new^2) time
      and O(d_in r_new) memory. With `orthonormal` the new rows are made orthonormal, so all of A_new is.

    The scale alpha / r is not part of the factors: the caller must hold it at its old value.

    Args:
        A: (r, d_in), floating point; not changed.
        B: (d_out, r); not changed.
        r_new: the rank to reach, r <= r_new <= min(d_in, d_out).
        mode: see above.
        generator: a CPU generator; noise is drawn in float32 on the CPU, so results do not depend on the device.
        noise: "normal", or "uniform" for the U(0, 1) block of the authors' code, which is never scaled.
        orthonormal: for "qr" only; False leaves the projected rows raw, as the paper prints them.

    Returns:
        :class:`Grown`, always new tensors without a graph. `r_new == r` gives plain copies under "gaussian" and the
        QR form of the same rank under "qr".

    Raises:
        AdapterError: A or B holds NaN or infinity.
        ConfigError: r_new is out of its range.

    Source: paper section 3.4. Departures: the paper has the random factor on the output side (dW = A B), here it is on
    the input side, as in the authors' code; the rescaling under "gaussian" and `orthonormal` under "qr" are ours: rows
    of the printed N(0, 1) blocks are about sqrt(3 d_in) times as long as the rows LoRA starts with.

    >>> import torch
    >>> A, B = torch.randn(2, 6), torch.randn(5, 2)
    >>> grown = grow(A, B, 4, "qr", generator=torch.Generator().manual_seed(0))
    >>> grown.A.shape, grown.B.shape
    (torch.Size([4, 6]), torch.Size([5, 4]))
    >>> torch.allclose(grown.B @ grown.A, B @ A, atol=1e-5)
    True
    """
    r, widest = A.shape[0], min(A.shape[1], B.shape[0])
    if not r <= r_new <= widest:
        raise ConfigError(f"r_new={r_new} is not allowed for this adapter of rank {r}; use {r} to at most {widest}")
    for name, factor in (("A", A), ("B", B)):
        if not bool(factor.isfinite().all()):
            raise AdapterError(
                f"{name} holds NaN or infinity; training diverged before growth: lower the learning rate"
            )
    with torch.no_grad():
        work = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
        extra = _draw(r_new - A.shape[0], A.shape[1], noise, generator).to(A.device, work)
        if mode == "gaussian":
            rows = _to_mean_norm(extra, A.to(work)) if noise == "normal" else extra
            return Grown(A=torch.cat([A, rows.to(A.dtype)]), B=_pad_columns(B, r_new), mix=None)
        q, mix = _qr(A.to(work).T)
        rows = _outside(extra, q, orthonormal)
        a_new = torch.cat([q.T, rows]).to(A.dtype)
        b_new = (B.to(work) @ mix.T.to(B.device)).to(B.dtype)
        return Grown(A=a_new, B=_pad_columns(b_new, r_new), mix=mix)


def _draw(rows: int, columns: int, noise: Noise, generator: torch.Generator) -> Tensor:
    if noise == "normal":
        return torch.randn(rows, columns, generator=generator, dtype=torch.float32)
    return torch.rand(rows, columns, generator=generator, dtype=torch.float32)


def _to_mean_norm(extra: Tensor, A: Tensor) -> Tensor:
    """Rows of `extra`, each as long as the rows of A are on average."""
    mean = torch.linalg.vector_norm(A, dim=1).mean()
    target = torch.where(mean > 0, mean, torch.full_like(mean, _LORA_ROW_NORM))
    scaled: Tensor = extra * (target / torch.linalg.vector_norm(extra, dim=1, keepdim=True))
    return scaled


def _qr(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced QR with a non-negative diagonal of R: unique at full rank, so the same from every backend."""
    q, r = torch.linalg.qr(columns)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r.dtype)
    return q * sign, r * sign[:, None]


def _outside(rows: Tensor, q: Tensor, orthonormal: bool) -> Tensor:
    """Part of `rows` (m, d) orthogonal to the columns of q (d, r); never forms q q^T."""
    outside = rows - (rows @ q) @ q.T
    if not orthonormal or not len(rows):
        return outside
    # One pass leaves rounding error that the normalisation may magnify; the second pass removes it.
    outside = _qr(outside.T)[0].T
    outside = outside - (outside @ q) @ q.T
    return _qr(outside.T)[0].T


def _pad_columns(B: Tensor, r_new: int) -> Tensor:
    return torch.cat([B, B.new_zeros(B.shape[0], r_new - B.shape[1])], dim=1)
