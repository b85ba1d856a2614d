"""The adapter path with its backward written out: one shared input, one rank-r product, and the gate is free."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from weightlora.ops.dropout import draw_seed, drawn, drop_

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

    class _Context(FunctionCtx):
        """What a forward pass leaves for its backward pass."""

        needs_input_grad: tuple[bool, ...]
        saved_tensors: tuple[Tensor, ...]  # x, gate, h and seed may be None
        scale: float
        dropout: float
        dtype: torch.dtype
        products: Products
        shape: torch.Size
        x_dtype: torch.dtype


Seed = int | Tensor
"""Of dropout: a number, or a tensor ``()`` int64 on the device."""


class Products(Protocol):
    """The products of the adapter path that touch something as large as the input or the output.

    ``p`` and ``seed`` say which entries of the input are dropped; survivors are not scaled up. ``mixes``: whether two
    dtypes may meet in a product at no cost. ``draws``: whether a seed may lie on the device, where kernels read it.
    """

    mixes: bool
    draws: bool

    def down(self, x: Tensor, A: Tensor, dtype: torch.dtype, p: float, seed: Seed) -> Tensor:
        """``drop(x) A^T``: (tokens, d) and (r, d) to (tokens, r) in `dtype`."""
        ...

    def add(self, result: Tensor, h: Tensor, B: Tensor, scale: float, in_place: bool) -> Tensor:
        """``result + scale h B^T``, in result's memory or in new: (tokens, d_out), (tokens, r), (d_out, r)."""
        ...

    def outer(self, h: Tensor, g: Tensor) -> Tensor:
        """``h^T g``: (tokens, r) and (tokens, d_out) to (r, d_out) in h's dtype."""
        ...

    def back(
        self, u: Tensor, x: Tensor | None, A: Tensor | None, dtype: torch.dtype, p: float, seed: Seed
    ) -> tuple[Tensor | None, Tensor | None]:
        """``u^T drop(x)`` (r, d) in u's dtype and ``drop(u A)`` (tokens, d) in `dtype`; None in, None out."""
        ...


class TorchProducts:
    """The products by torch's own kernels, on any device."""

    mixes = False
    draws = False

    def down(self, x: Tensor, A: Tensor, dtype: torch.dtype, p: float, seed: Seed) -> Tensor:
        if p > 0.0:
            x = _copy(x, dtype)
            drop_(x, drawn(x, p, int(seed)))
        x, A = as_dtype(x, dtype), as_dtype(A, dtype)
        if x.device.type == "cpu":
            # With a thin matrix on the right a CPU's product takes up to four times as long: (A x^T)^T, as a view.
            return torch.mm(A.contiguous(), x.T).T
        return torch.mm(x, A.T)

    def add(self, result: Tensor, h: Tensor, B: Tensor, scale: float, in_place: bool) -> Tensor:
        out = result if in_place else torch.empty_like(result)
        if result.dtype == h.dtype:
            return torch.addmm(result, h, B.T, alpha=scale, out=out)
        # The sum is rounded once, as PEFT's is: a bfloat16 output and a float32 update meet in float32.
        return torch.add(result, torch.mm(h, B.T), alpha=scale, out=out)

    def outer(self, h: Tensor, g: Tensor) -> Tensor:
        return torch.mm(h.T, as_dtype(g, h.dtype))

    def back(
        self, u: Tensor, x: Tensor | None, A: Tensor | None, dtype: torch.dtype, p: float, seed: Seed
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_x = None if A is None else torch.mm(u, as_dtype(A, u.dtype))
        if p > 0.0:
            like = x if grad_x is None else grad_x
            assert like is not None
            dropped = drawn(like, p, int(seed))
            if grad_x is not None:
                drop_(grad_x, dropped)
            if x is not None:
                x = drop_(_copy(x, u.dtype), dropped)
        grad_A = None if x is None else torch.mm(u.T, as_dtype(x, u.dtype))
        return grad_A, (None if grad_x is None else as_dtype(grad_x, dtype))


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, at no cost where nothing is to be done."""
    return t if t.dtype == dtype else t.to(dtype)


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


TORCH = TorchProducts()


def compute_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """The dtype PEFT would multiply in: autocast's where it is on, else the adapter's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else A.dtype


class _SharedCast(threading.local):
    """Hands q, k and v the same narrow copy of their common input, so that autograd keeps one copy and not three.

    Holds weak references only: the copy lives as long as autograd keeps it.
    """

    last: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]] | None = None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.is_inference():  # has no version, and nothing is kept
            return x.to(dtype)
        if self.last is not None:
            source, version, copy = self.last[0](), self.last[1], self.last[2]()
            if source is x and version == x._version and copy is not None and copy.dtype == dtype:
                return copy
        copy = x.detach().to(dtype)
        self.last = (weakref.ref(x), x._version, weakref.ref(copy))
        return copy


_shared_cast = _SharedCast()


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


class AdapterFunction(torch.autograd.Function):
    """``y = result + s w (drop(x) A^T) B^T`` and its gradients.

    Keeps ``x`` in its own dtype (or autocast's, where that is narrower), ``h`` and a seed. s includes ``1 / (1 - p)``.
    """

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917  # torch passes a Function's arguments by position
        ctx: _Context,
        x: Tensor,
        result: Tensor,
        A: Tensor,
        B: Tensor,
        gate: Tensor | None,
        scale: float,
        dropout: float,
        in_place: bool,
        products: Products,
    ) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            # Every dtype is chosen here by hand; autocast must not choose again.
            with torch.autocast(device, enabled=False):
                return _forward(ctx, (x, result, A, B, gate), scale, dropout, dtype, in_place, products)
        return _forward(ctx, (x, result, A, B, gate), scale, dropout, A.dtype, in_place, products)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, g: Tensor) -> tuple[Tensor | None, ...]:
        device = g.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return (*_gradients(ctx, g), None, None, None, None)
        return (*_gradients(ctx, g), None, None, None, None)


def _forward(
    ctx: _Context,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    scale: float,
    dropout: float,
    dtype: torch.dtype,
    in_place: bool,
    products: Products,
) -> Tensor:
    x, result, A, B, gate = tensors
    scale = scale / (1.0 - dropout) if dropout < 1.0 else 0.0
    # What a CUDA graph captures draws anew whenever it is replayed.
    on = x.device if products.draws and x.is_cuda and torch.cuda.is_current_stream_capturing() else None
    seed = draw_seed(on) if dropout > 0.0 else None
    kept = _shared_cast(x, dtype) if dtype.itemsize < x.dtype.itemsize else x
    h = products.down(_flat(kept), A, dtype, dropout, _number(seed))
    # A detached alias is neither an input nor a view to autograd: the base layer's own backward is left as it was, and
    # whoever did save this output is told by its version counter.
    # The gate multiplies the small factor: no extra pass over the output, no host synchronisation.
    left = as_dtype(B if gate is None else B * _on(gate, B), dtype)
    taken = result.detach() if in_place else result.contiguous()
    sum_ = products.add(taken.view(-1, taken.shape[-1]), h, left, scale, in_place)
    out = taken if in_place else sum_.view(taken.shape)
    need = ctx.needs_input_grad
    ctx.save_for_backward(kept if need[2] else None, A, B, gate, h if need[3] or need[4] else None, seed)  # type: ignore[arg-type]
    ctx.scale, ctx.dropout, ctx.dtype, ctx.products = scale, dropout, dtype, products
    ctx.shape, ctx.x_dtype = x.shape, x.dtype
    return out


def _gradients(ctx: _Context, g: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, result, A, B and gate."""
    x, A, B, gate, h, seed = ctx.saved_tensors
    dtype, scale, products = ctx.dtype, ctx.scale, ctx.products
    need_x, need_result, need_A, need_B, need_gate = ctx.needs_input_grad[:5]
    # Two products read it: cast once, where it has to be cast at all.
    grad = _flat(g) if products.mixes else as_dtype(_flat(g), dtype)
    exact = torch.promote_types(dtype, torch.float32)
    strength = scale if gate is None else as_dtype(_on(gate, B), exact) * scale
    grad_x = grad_A = grad_B = grad_gate = None
    if need_B:
        # This way round the long side is the contiguous one.
        grad_B = as_dtype((products.outer(h, grad) * strength).T, B.dtype)
    if need_A or need_x or need_gate:
        gB = products.down(grad, B.T, dtype, 0.0, 0)
        if need_gate:
            inner = (as_dtype(gB, exact) * as_dtype(h, exact)).sum()
            grad_gate = as_dtype(_on(inner * scale, gate), gate.dtype)
        if need_A or need_x:
            grad_A, grad_x = products.back(
                as_dtype(gB * strength, dtype),
                _flat(x) if need_A else None,
                A if need_x else None,
                ctx.x_dtype,
                ctx.dropout,
                _number(seed),
            )
            grad_A = None if grad_A is None else as_dtype(grad_A, A.dtype)
            grad_x = None if grad_x is None else grad_x.view(ctx.shape)
    return grad_x, (g if need_result else None), grad_A, grad_B, grad_gate


def _number(seed: Tensor | None) -> Seed:
    """A seed as products take it. On the host it is read there; on a device it stays, so that nothing waits for it."""
    if seed is None:
        return 0
    return int(seed) if seed.device.type == "cpu" else seed


def _on(t: Tensor, other: Tensor) -> Tensor:
    return t if t.device == other.device else t.to(other.device)


def _may_overwrite(x: Tensor, result: Tensor) -> bool:
    """Whether `result` is an operation's fresh output: not a leaf, not the input passed through, nothing exotic."""
    return (
        result.grad_fn is not None
        and type(result) is Tensor
        and result.is_contiguous()
        and result.data_ptr() != x.data_ptr()
    )


def _composed(
    x: Tensor, result: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """The same formula for a compiler, which fuses it and chooses what to keep by itself."""
    dtype = compute_dtype(x, A)
    h = F.linear(F.dropout(x, dropout, training=dropout > 0.0).to(dtype), A.to(dtype))
    left = B * scale if gate is None else B * (scale * gate.to(device=B.device, dtype=B.dtype))
    return (result + F.linear(h, left.to(dtype))).to(result.dtype)


def adapter_path(
    x: Tensor,
    result: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    *,
    products: Products = TORCH,
) -> Tensor:
    """Add one gated LoRA update to a linear layer's output; for backward, keep ``x``, ``h = drop(x) A^T`` and a seed.

    With upstream gradient ``g`` and ``gB = g B``:
    ``dB = s w g^T h``, ``dA = s w gB^T drop(x)``, ``dx = s w gB A``, ``dw = s sum(gB * h)``.
    Plain LoRA needs each product already, so the gate costs nothing, and its gradient is right at ``w = 0`` too.

    Arguments, result: as :func:`weightlora.ops.reference.adapter_path`, and

    - the output has result's dtype;
    - ``result`` is taken over: where it is the output of an operation in the autograd graph (as a base layer's is), the
      update is added into its memory, and it must not be read again. Leaves are left alone;
    - ``dropout`` is drawn from a seed, twice (see :mod:`weightlora.ops.dropout`), independently for every call;
    - ``x`` is kept in its own dtype, so float32 adapters on a bfloat16 base keep no float32 copy, and q, k and v share
      it; under autocast a wider ``x`` is kept as one cast copy, shared too;
    - inside ``torch.compile`` the formula is handed to the compiler, with torch's own dropout.

    Source: paper, equation (3); the backward is ours. Departs from PEFT's forward in rounding and in the random stream
    of dropout; supports first derivatives only.

    >>> import torch
    >>> x, W = torch.ones(1, 3), torch.zeros(1, 2)
    >>> adapter_path(x, W, torch.ones(1, 3), torch.ones(2, 1), torch.tensor(0.5), 2.0)
    tensor([[3., 3.]])
    """
    if torch.compiler.is_compiling():
        return _composed(x, result, A, B, gate, scale, dropout)
    in_place = _may_overwrite(x, result)
    out: Tensor = AdapterFunction.apply(x, result, A, B, gate, scale, dropout, in_place, products)
    return out
