"""The adapter path with kernels for what no plain matrix product does: drop without a mask, mix dtypes without a copy.

Everything else goes to torch's own products, which are at least as good there. The formula, what is kept and what is
returned are :mod:`weightlora.ops.autograd`'s; only the products differ.
"""

from __future__ import annotations

# ruff: noqa: PLR0913, PLR0917  # a kernel has no other way to take its sizes, strides and options
from typing import Any

import torch
from torch import Tensor

from weightlora.errors import ConfigError
from weightlora.ops import autograd
from weightlora.ops.autograd import TORCH, TorchProducts

try:
    import triton
    import triton.language as tl
except ImportError:  # to be read and documented only; weightlora.ops.why_no_triton says that it cannot run
    triton = tl = None

TOKENS, WIDTH = 32, 64  # entries of a tile; tl.dot wants 16 or more each way
SLICES = 8  # of the tokens, summed separately in the reduction over them, so that more than a few programs run


def _jit(kernel: Any) -> Any:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _kept(seed, t, d, width, p):
    # One number per entry, by its place: forward and backward draw the same, whatever the tiling. It wraps at 2**32.
    offset = t.to(tl.int32)[:, None] * width + d[None, :]
    return tl.rand(seed, offset) >= p


@_jit
def _down(
    x, A, h, tokens, width, rank, x_t, x_d, A_r, A_d, seed, p,
    DROP: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``h (tokens, rank) = drop(x) A^T``, a block of tokens a program."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    r = tl.arange(0, BR)
    total = tl.zeros((BT, BR), dtype=tl.float32)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        inside = (t < tokens)[:, None] & (d < width)[None, :]
        block = tl.load(x + t[:, None] * x_t + d[None, :] * x_d, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            block = tl.where(_kept(seed, t, d, width, p), block, 0.0)
        known = (r < rank)[None, :] & (d < width)[:, None]
        factor = tl.load(A + r[None, :] * A_r + d[:, None] * A_d, mask=known, other=0.0).to(tl.float32)
        total = tl.dot(block, factor, total, input_precision=PRECISION)
    tl.store(h + t[:, None] * rank + r[None, :], total, mask=(t < tokens)[:, None] & (r < rank)[None, :])


@_jit
def _up(
    out, h, B, tokens, width, rank, B_r, B_d, scale, seed, p, ADD: tl.constexpr,
    DROP: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``out (tokens, width) = [out +] drop(scale h B^T)``, a tile a program; B is (width, rank) by its strides."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    r = tl.arange(0, BR)
    left = tl.load(h + t[:, None] * rank + r[None, :], mask=(t < tokens)[:, None] & (r < rank)[None, :], other=0.0)
    right = tl.load(B + r[:, None] * B_r + d[None, :] * B_d, mask=(r < rank)[:, None] & (d < width)[None, :], other=0.0)
    tile = scale * tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision=PRECISION)
    if DROP:
        tile = tl.where(_kept(seed, t, d, width, p), tile, 0.0)
    inside = (t < tokens)[:, None] & (d < width)[None, :]
    place = out + t[:, None] * width + d[None, :]
    if ADD:
        tile += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, tile, mask=inside)


@_jit
def _outer(
    u, x, out, tokens, width, rank, x_t, x_d, part, seed, p,
    DROP: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``out (slice, rank, width) = u^T drop(x)`` over the tokens of one slice, a block of the width a program."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    r = tl.arange(0, BR)
    first = tl.program_id(1) * part
    total = tl.zeros((BR, BD), dtype=tl.float32)
    for start in range(0, part, BT):
        t = (first + start + tl.arange(0, BT)).to(tl.int64)
        mine = (t < tokens) & (start + tl.arange(0, BT) < part)
        left = tl.load(u + t[None, :] * rank + r[:, None], mask=mine[None, :] & (r < rank)[:, None], other=0.0)
        inside = mine[:, None] & (d < width)[None, :]
        block = tl.load(x + t[:, None] * x_t + d[None, :] * x_d, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            block = tl.where(_kept(seed, t, d, width, p), block, 0.0)
        total = tl.dot(left.to(tl.float32), block, total, input_precision=PRECISION)
    place = out + (tl.program_id(1) * rank + r[:, None]) * width + d[None, :]
    tl.store(place, total, mask=(r < rank)[:, None] & (d < width)[None, :])


# The kernels multiply in float32 on the tensor cores. TF32 holds every bfloat16 and float16 number exactly, so one pass
# is exact for those; float32 takes three.
_PRECISION = {torch.float32: "tf32x3", torch.bfloat16: "tf32", torch.float16: "tf32"}


# On the CPU, by Triton's interpreter: triton.jit then makes something else than a JITFunction.
INTERPRETED = triton is not None and not isinstance(_down, triton.JITFunction)


def _rank_block(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


class TritonProducts:
    """As :class:`weightlora.ops.autograd.TorchProducts`, with a kernel where the input is dropped or dtypes differ."""

    mixes = True

    def down(self, x: Tensor, A: Tensor, dtype: torch.dtype, p: float, seed: int) -> Tensor:
        if p == 0.0 and x.dtype == A.dtype == dtype:
            return TORCH.down(x, A, dtype, p, seed)
        (tokens, width), rank = x.shape, A.shape[0]
        h = torch.empty(tokens, rank, dtype=dtype, device=x.device)
        with torch.cuda.device_of(x):
            _down[triton.cdiv(tokens, TOKENS),](
                x, A, h, tokens, width, rank, *x.stride(), *A.stride(), seed, p,
                DROP=p > 0.0, PRECISION=_PRECISION[dtype], BT=TOKENS, BD=WIDTH, BR=_rank_block(rank),
            )  # fmt: skip
        return h

    def add_(self, out: Tensor, h: Tensor, B: Tensor, scale: float) -> None:
        if out.dtype == h.dtype:
            TORCH.add_(out, h, B, scale)
        else:
            self._up(out, h, B, scale, add=True, p=0.0, seed=0)

    def outer(self, h: Tensor, g: Tensor) -> Tensor:
        return TORCH.outer(h, g) if g.dtype == h.dtype else self._outer(h, g, 0.0, 0)

    def back(
        self, u: Tensor, x: Tensor | None, A: Tensor | None, dtype: torch.dtype, p: float, seed: int
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_A = grad_x = None
        if x is not None:
            plain = p == 0.0 and x.dtype == u.dtype
            grad_A = TORCH.outer(u, x) if plain else self._outer(u, x, p, seed)
        if A is not None:
            if p == 0.0 and dtype == u.dtype:
                grad_x = torch.mm(u, autograd.as_dtype(A, u.dtype))
            else:
                grad_x = torch.empty(u.shape[0], A.shape[1], dtype=dtype, device=u.device)
                self._up(grad_x, u, A.T, 1.0, add=False, p=p, seed=seed)
        return grad_A, grad_x

    def _up(self, out: Tensor, h: Tensor, B: Tensor, scale: float, *, add: bool, p: float, seed: int) -> None:
        (tokens, width), rank = out.shape, h.shape[1]
        h = h.contiguous()
        with torch.cuda.device_of(out):
            _up[triton.cdiv(tokens, TOKENS), triton.cdiv(width, WIDTH)](
                out, h, B, tokens, width, rank, B.stride(1), B.stride(0), scale, seed, p,
                ADD=add, DROP=p > 0.0, PRECISION=_PRECISION[h.dtype], BT=TOKENS, BD=WIDTH, BR=_rank_block(rank),
            )  # fmt: skip

    def _outer(self, u: Tensor, x: Tensor, p: float, seed: int) -> Tensor:
        (tokens, width), rank = x.shape, u.shape[1]
        part = TOKENS * triton.cdiv(tokens, TOKENS * SLICES)
        slices = triton.cdiv(tokens, part)
        parts = torch.empty(slices, rank, width, dtype=torch.float32, device=x.device)
        u = u.contiguous()
        with torch.cuda.device_of(x):
            _outer[triton.cdiv(width, WIDTH), slices](
                u, x, parts, tokens, width, rank, *x.stride(), part, seed, p,
                DROP=p > 0.0, PRECISION=_PRECISION[u.dtype], BT=TOKENS, BD=WIDTH, BR=_rank_block(rank),
            )  # fmt: skip
        return parts.sum(0).to(u.dtype)


TRITON: TorchProducts | TritonProducts = TritonProducts()


def _why_not(x: Tensor, A: Tensor) -> str | None:
    if x.device.type != "cuda" and not INTERPRETED:
        return f"the input is on {x.device}, and the kernels are for CUDA"
    dtype = autograd.compute_dtype(x, A)
    if dtype not in _PRECISION or x.dtype not in _PRECISION:
        return f"it computes in float32, bfloat16 and float16, not with {x.dtype} in {dtype}"
    return None


def adapter_path(
    x: Tensor, result: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """As :func:`weightlora.ops.autograd.adapter_path`, with Triton's kernels.

    Raises:
        ConfigError: these tensors are not on a CUDA device, or are of a dtype without kernels.
    """
    reason = _why_not(x, A)
    if reason is not None:
        raise ConfigError(f"engine 'triton' cannot run: {reason}; use engine='autograd'")
    return autograd.adapter_path(x, result, A, B, gate, scale, dropout, products=TRITON)


def adapter_path_or_torch(
    x: Tensor, result: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """:func:`adapter_path` where it can run, else the any-device engine: what "auto" stands for."""
    products = TORCH if torch.compiler.is_compiling() or _why_not(x, A) is not None else TRITON
    return autograd.adapter_path(x, result, A, B, gate, scale, dropout, products=products)
