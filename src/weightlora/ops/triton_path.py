"""The adapter path with kernels for what no plain matrix product does: drop without a mask, mix dtypes without a copy.

Everything else goes to torch's own products, which are at least as good there. The formula, what is kept and what is
returned are :mod:`weightlora.ops.autograd`'s; only the products differ.
"""

from __future__ import annotations

# ruff: noqa: PLR0913, PLR0917  # a kernel has no other way to take its sizes, strides and options
import inspect
from collections.abc import Sequence
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

# An H200 has 132 processors; with three programs for each, all of its memory's bandwidth is asked for (docs/gpu.md).
PROGRAMS = 396


def _jit(kernel: object) -> Any:
    # Sizes that vary without a gain from knowing them: each new value would compile a kernel anew.
    varies = ["tokens", "rank", "part", "seed", "threshold", "groups"]
    if triton is None:
        return kernel
    return triton.jit(kernel, do_not_specialize=[name for name in varies if name in _parameters(kernel)])


def _parameters(kernel: Any) -> Sequence[str]:
    return tuple(inspect.signature(kernel).parameters)


@_jit
def _kept(seed, t, first, groups, threshold, BD: tl.constexpr):
    """The mask of tokens `t` and of `BD` places from `first` on: 16 bits for each, eight of them from one call.

    By the entry's place alone: forward and backward draw the same, whatever the tiling. It wraps at 2**35 entries.
    Philox with 7 rounds passes every test of randomness that its authors made (Salmon et al. 2011).
    """
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    group = first // 8 + tl.arange(0, BD // 8)
    a, b, c, d = tl.randint4x(seed, t.to(tl.int32)[:, None] * groups + group[None, :], 7)
    four = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.uint32, bitcast=True)
    eight = tl.join(four & 0xFFFF, four >> 16)
    return tl.reshape(eight, (t.shape[0], BD)).to(tl.int32) >= threshold


# On the CPU, by Triton's interpreter: triton.jit then makes something else than a JITFunction.
INTERPRETED = triton is not None and not isinstance(_kept, triton.JITFunction)
# The interpreter's tl.dot multiplies the bits of bfloat16 numbers. Their products are exact in float32.
_WIDEN = INTERPRETED if triton is None else tl.constexpr(INTERPRETED)


@_jit
def _mma(left, right, total):
    return tl.dot(left.to(tl.float32), right.to(tl.float32), total) if _WIDEN else tl.dot(left, right, total)


@_jit
def _split(t):
    """The bfloat16 number nearest to each of `t`, and what is left of it."""
    high = t.to(tl.bfloat16)
    return high, t - high.to(tl.float32)


@_jit
def _dot(left, right, total, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """``total + left right`` in float32.

    float32 goes through the tensor cores in bfloat16 parts: three hold all of its 24 bits, two hold 16, which is more
    than a `NARROW` result can tell.
    """
    if left.dtype == right.dtype and left.dtype != tl.float32:
        total = _mma(left, right, total)
    elif left.dtype == tl.bfloat16 and right.dtype == tl.float32:
        high, rest = _split(right)
        middle, rest = _split(rest)
        total = _mma(left, rest.to(tl.bfloat16), total)
        total = _mma(left, middle, total)
        total = _mma(left, high, total)
    elif right.dtype == tl.bfloat16 and left.dtype == tl.float32:
        high, rest = _split(left)
        middle, rest = _split(rest)
        total = _mma(rest.to(tl.bfloat16), right, total)
        total = _mma(middle, right, total)
        total = _mma(high, right, total)
    elif NARROW and left.dtype == tl.float32 and right.dtype == tl.float32:
        high, rest = _split(left)
        other, remainder = _split(right)
        total = _mma(rest.to(tl.bfloat16), other, total)
        total = _mma(high, remainder.to(tl.bfloat16), total)
        total = _mma(high, other, total)
    else:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision=PRECISION)
    return total


@_jit
def _down(
    x, A, h, tokens, width, rank, x_t, x_d, A_r, A_d, part, seed, groups, threshold,
    DROP: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``h (slice, tokens, rank) = drop(x) A^T`` over one slice of the width, a block of tokens a program."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    r = tl.arange(0, BR)
    first = tl.program_id(1) * part * BD
    total = tl.zeros((BT, BR), dtype=tl.float32)
    for start in range(first, tl.minimum(first + part * BD, width), BD):
        d = start + tl.arange(0, BD)
        inside = (t < tokens)[:, None] & (d < width)[None, :]
        block = tl.load(x + t[:, None] * x_t + d[None, :] * x_d, mask=inside, other=0.0)
        if DROP:
            block = tl.where(_kept(seed, t, start, groups, threshold, BD), block, 0.0)
        known = (r < rank)[None, :] & (d < width)[:, None]
        factor = tl.load(A + r[None, :] * A_r + d[:, None] * A_d, mask=known, other=0.0)
        total = _dot(block, factor, total, False, PRECISION)
    place = h + (tl.program_id(1) * tokens + t[:, None]) * rank + r[None, :]
    tl.store(place, total, mask=(t < tokens)[:, None] & (r < rank)[None, :])


@_jit
def _up(
    base, out, h, B, tokens, width, rank, B_r, B_d, scale, seed, groups, threshold, ADD: tl.constexpr,
    DROP: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``out (tokens, width) = [base +] drop(scale h B^T)``, a tile a program; B is (width, rank) by its strides."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    r = tl.arange(0, BR)
    NARROW: tl.constexpr = out.dtype.element_ty != tl.float32
    left = tl.load(h + t[:, None] * rank + r[None, :], mask=(t < tokens)[:, None] & (r < rank)[None, :], other=0.0)
    right = tl.load(B + r[:, None] * B_r + d[None, :] * B_d, mask=(r < rank)[:, None] & (d < width)[None, :], other=0.0)
    tile = scale * _dot(left, right, tl.zeros((BT, BD), dtype=tl.float32), NARROW, PRECISION)
    if DROP:
        tile = tl.where(_kept(seed, t, tl.program_id(1) * BD, groups, threshold, BD), tile, 0.0)
    inside = (t < tokens)[:, None] & (d < width)[None, :]
    place = t[:, None] * width + d[None, :]
    if ADD:
        tile += tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, tile, mask=inside)


@_jit
def _outer(
    u, x, out, tokens, width, rank, x_t, x_d, part, seed, groups, threshold,
    DROP: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``out (slice, rank, width) = u^T drop(x)`` over the tokens of one slice, a block of the width a program."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    r = tl.arange(0, BR)
    first = tl.program_id(1) * part * BT
    total = tl.zeros((BR, BD), dtype=tl.float32)
    for start in range(first, tl.minimum(first + part * BT, tokens), BT):
        t = (start + tl.arange(0, BT)).to(tl.int64)
        left = tl.load(u + t[None, :] * rank + r[:, None], mask=(t < tokens)[None, :] & (r < rank)[:, None], other=0.0)
        inside = (t < tokens)[:, None] & (d < width)[None, :]
        block = tl.load(x + t[:, None] * x_t + d[None, :] * x_d, mask=inside, other=0.0)
        if DROP:
            block = tl.where(_kept(seed, t, tl.program_id(0) * BD, groups, threshold, BD), block, 0.0)
        total = _dot(left, block, total, False, PRECISION)
    place = out + (tl.program_id(1) * rank + r[:, None]) * width + d[None, :]
    tl.store(place, total, mask=(r < rank)[:, None] & (d < width)[None, :])


@_jit
def _back(
    u, x, A, out, grad, tokens, width, rank, x_t, x_d, A_r, A_d, part, seed, groups, threshold,
    DROP: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """`_outer`, and ``grad (tokens, width) = drop(u A)`` beside it: one mask for both."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    r = tl.arange(0, BR)
    first = tl.program_id(1) * part * BT
    NARROW: tl.constexpr = grad.dtype.element_ty != tl.float32
    known = (r < rank)[:, None] & (d < width)[None, :]
    factor = tl.load(A + r[:, None] * A_r + d[None, :] * A_d, mask=known, other=0.0)
    total = tl.zeros((BR, BD), dtype=tl.float32)
    for start in range(first, tl.minimum(first + part * BT, tokens), BT):
        t = (start + tl.arange(0, BT)).to(tl.int64)
        left = tl.load(u + t[:, None] * rank + r[None, :], mask=(t < tokens)[:, None] & (r < rank)[None, :], other=0.0)
        inside = (t < tokens)[:, None] & (d < width)[None, :]
        block = tl.load(x + t[:, None] * x_t + d[None, :] * x_d, mask=inside, other=0.0)
        tile = _dot(left, factor.to(left.dtype), tl.zeros((BT, BD), dtype=tl.float32), NARROW, PRECISION)
        if DROP:
            kept = _kept(seed, t, tl.program_id(0) * BD, groups, threshold, BD)
            block = tl.where(kept, block, 0.0)
            tile = tl.where(kept, tile, 0.0)
        total = _dot(tl.trans(left), block, total, False, PRECISION)
        tl.store(grad + t[:, None] * width + d[None, :], tile, mask=inside)
    place = out + (tl.program_id(1) * rank + r[:, None]) * width + d[None, :]
    tl.store(place, total, mask=known)


# How float32 meets float32: three passes of TF32 on the tensor cores; AMD's have float32 itself.
_FLOAT32 = "ieee" if torch.version.hip else "tf32x3"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Of a tile: tokens and width.
TILES = {"_down": (64, 64), "_up": (64, 64), "_outer": (32, 128), "_back": (16, 128)}
# A rank's block: what tl.dot wants at least, and up to which the copies that the kernels save outweigh arithmetic.
RANKS = (16, 32, 64)


def tile(kernel: str, block: int) -> tuple[int, int]:
    """Tokens and width of a kernel's tile: what compiles for every dtype and device without a spilled register."""
    tokens, width = TILES[kernel]
    if block == RANKS[-1]:  # what is summed up has grown: half of what a turn of the loop takes
        halves = {"_down": (tokens, width // 2), "_outer": (tokens // 2, width)}
        return halves.get(kernel, (tokens, width))
    return tokens, width


def _options(kernel: str, rank: int, p: float) -> dict[str, object]:
    block = _block(rank)
    tokens, width = tile(kernel, block)
    return {"BT": tokens, "BD": width, "BR": block, "DROP": p > 0.0, "PRECISION": _FLOAT32}


def _block(rank: int) -> int:
    return next(block for block in RANKS if rank <= block)


def _split_into(blocks: int, others: int) -> tuple[int, int]:
    """How many blocks one of the programs beside `others` takes, and how many such programs there are."""
    part = triton.cdiv(blocks, max(1, min(blocks, PROGRAMS // others)))
    return part, triton.cdiv(blocks, part)


def _drawn_by(seed: int | Tensor, width: int, p: float) -> tuple[int | Tensor, int, int]:
    """The arguments of :func:`_kept`: p in units of 2**-16."""
    return seed, triton.cdiv(width, 8), round(p * 65536)


class TritonProducts:
    """As :class:`weightlora.ops.autograd.TorchProducts`, with a kernel where the input is dropped or dtypes differ."""

    mixes = True
    draws = True

    def down(self, x: Tensor, A: Tensor, dtype: torch.dtype, p: float, seed: int | Tensor) -> Tensor:
        A = autograd.as_dtype(A, dtype)
        if p == 0.0 and x.dtype == dtype:
            return torch.mm(x, A.T)
        (tokens, width), rank = x.shape, A.shape[0]
        options = _options("_down", rank, p)
        blocks = triton.cdiv(tokens, options["BT"])
        part, slices = _split_into(triton.cdiv(width, options["BD"]), blocks)
        h = torch.empty(slices, tokens, rank, dtype=dtype if slices == 1 else torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _down[blocks, slices](
                x, A, h, tokens, width, rank, *x.stride(), *A.stride(), part, *_drawn_by(seed, width, p), **options
            )
        return h[0] if slices == 1 else autograd.as_dtype(h.sum(0), dtype)

    def add(self, result: Tensor, h: Tensor, B: Tensor, scale: float, in_place: bool) -> Tensor:
        if result.dtype == h.dtype:
            return TORCH.add(result, h, B, scale, in_place)
        return self._up(result, result if in_place else torch.empty_like(result), h, B, scale, 0.0, 0)

    def outer(self, h: Tensor, g: Tensor) -> Tensor:
        return TORCH.outer(h, g) if g.dtype == h.dtype else self._outer(h, g, 0.0, 0)

    def back(
        self, u: Tensor, x: Tensor | None, A: Tensor | None, dtype: torch.dtype, p: float, seed: int | Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        A = None if A is None else autograd.as_dtype(A, u.dtype)
        if p == 0.0 and u.dtype == dtype == (u if x is None else x).dtype:
            return TORCH.back(u, x, A, dtype, p, 0)
        if x is not None and A is not None and _block(u.shape[1]) == RANKS[0]:
            return self._back(u, x, A, dtype, p, seed)
        grad_A = None if x is None else self._outer(u, x, p, seed)
        if A is None:
            return grad_A, None
        grad = torch.empty(u.shape[0], A.shape[1], dtype=dtype, device=u.device)
        return grad_A, self._up(None, grad, u, A.T, 1.0, p, seed)

    def _up(
        self, base: Tensor | None, out: Tensor, h: Tensor, B: Tensor, scale: float, p: float, seed: int | Tensor
    ) -> Tensor:
        (tokens, width), rank = out.shape, h.shape[1]
        h, options = h.contiguous(), _options("_up", rank, p)
        with torch.cuda.device_of(out):
            _up[triton.cdiv(tokens, options["BT"]), triton.cdiv(width, options["BD"])](
                out if base is None else base, out, h, B, tokens, width, rank, B.stride(1), B.stride(0), scale,
                *_drawn_by(seed, width, p), ADD=base is not None, **options,
            )  # fmt: skip
        return out

    def _outer(self, u: Tensor, x: Tensor, p: float, seed: int | Tensor) -> Tensor:
        (tokens, width), rank = x.shape, u.shape[1]
        u, options = u.contiguous(), _options("_outer", rank, p)
        blocks = triton.cdiv(width, options["BD"])
        part, slices = _split_into(triton.cdiv(tokens, options["BT"]), blocks)
        parts = torch.empty(slices, rank, width, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _outer[blocks, slices](
                u, x, parts, tokens, width, rank, *x.stride(), part, *_drawn_by(seed, width, p), **options
            )
        return autograd.as_dtype(parts.sum(0), u.dtype)

    def _back(
        self, u: Tensor, x: Tensor, A: Tensor, dtype: torch.dtype, p: float, seed: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        (tokens, width), rank = x.shape, u.shape[1]
        u, options = u.contiguous(), _options("_back", rank, p)
        blocks = triton.cdiv(width, options["BD"])
        part, slices = _split_into(triton.cdiv(tokens, options["BT"]), blocks)
        parts = torch.empty(slices, rank, width, dtype=torch.float32, device=x.device)
        grad = torch.empty(tokens, width, dtype=dtype, device=x.device)
        with torch.cuda.device_of(x):
            _back[blocks, slices](
                u, x, A, parts, grad, tokens, width, rank, *x.stride(), *A.stride(), part,
                *_drawn_by(seed, width, p), **options,
            )  # fmt: skip
        return autograd.as_dtype(parts.sum(0), u.dtype), grad


TRITON: TorchProducts | TritonProducts = TritonProducts()


def _why_not(x: Tensor, A: Tensor) -> str | None:
    if x.device.type != "cuda" and not INTERPRETED:
        return f"the input is on {x.device}, and the kernels are for CUDA"
    dtype = autograd.compute_dtype(x, A)
    if dtype not in _DTYPES or x.dtype not in _DTYPES:
        return f"it computes in float32, bfloat16 and float16, not with {x.dtype} in {dtype}"
    return None


def _products(A: Tensor) -> TorchProducts | TritonProducts:
    return TRITON if A.shape[0] <= RANKS[-1] else TORCH


def adapter_path(
    x: Tensor, result: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """As :func:`weightlora.ops.autograd.adapter_path`, with Triton's kernels up to rank 64, torch's beyond.

    Raises:
        ConfigError: these tensors are not on a CUDA device, or are of a dtype without kernels.
    """
    reason = _why_not(x, A)
    if reason is not None:
        raise ConfigError(f"engine 'triton' cannot run: {reason}; use engine='autograd'")
    return autograd.adapter_path(x, result, A, B, gate, scale, dropout, products=_products(A))


def adapter_path_or_torch(
    x: Tensor, result: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """:func:`adapter_path` where it can run, else the any-device engine: what "auto" stands for."""
    products = TORCH if torch.compiler.is_compiling() or _why_not(x, A) is not None else _products(A)
    return autograd.adapter_path(x, result, A, B, gate, scale, dropout, products=products)
