"""Running a model without its weights: tensors that have a shape, a dtype and a device, and no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def stand_ins(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors without data in the place of parameters, and of buffers on the meta device. Ties stay ties."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Tensor] = {}

    def stand_in(t: Tensor) -> Tensor:
        if id(t) not in made:
            device = torch.device("cpu") if t.device.type == "meta" else t.device
            with mode:
                made[id(t)] = torch.empty(t.shape, dtype=t.dtype, device=device)
            # PEFT looks for parameters where it adapts bare ones.
            made[id(t)] = nn.Parameter(made[id(t)], t.requires_grad) if isinstance(t, nn.Parameter) else made[id(t)]
        return made[id(t)]

    parameters = {key: stand_in(p) for key, p in model.named_parameters(remove_duplicate=False)}
    buffers = {key: b for key, b in model.named_buffers(remove_duplicate=False)}
    return parameters, {key: stand_in(b) for key, b in buffers.items() if b.device.type == "meta"}


@contextlib.contextmanager
def standing_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of a model's own, by name, and its own back under every name that a module has."""
    before: dict[tuple[int, str], tuple[dict[str, object], object]] = {}
    try:
        for key, tensor in tensors.items():
            path, _, leaf = key.rpartition(".")
            module = model.get_submodule(path)
            slot: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
            before.setdefault((id(slot), leaf), (slot, slot[leaf]))
            slot[leaf] = tensor
        yield
    finally:
        for (_, leaf), (slot, own) in before.items():
            slot[leaf] = own


@contextlib.contextmanager
def uncheckpointed(model: nn.Module) -> Iterator[None]:
    """Checkpointing off: what it would keep follows from what is kept without it."""
    modules: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


class KnownMasks(TorchFunctionMode):
    """Indexing by a mask whose values are known becomes indexing by positions, so that its result has a known shape.

    ``stands_for``: the mask, by the storage of the positions; autograd would keep the mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stands_for: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            items = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(_is_known_mask(item) for item in items):
                known: list[object] = []
                for item in items:
                    known += self._positions(item) if _is_known_mask(item) else [item]
                args = (args[0], tuple(known))
        return func(*args, **(kwargs or {}))

    def _positions(self, mask: Tensor) -> tuple[Tensor, ...]:
        positions = mask.nonzero(as_tuple=True)
        self.stands_for |= {identity(position): mask for position in positions}
        return positions


class CudaKernels(TorchFunctionMode):
    """Dropout and attention by the operations that CUDA runs, wherever the stand-ins claim to be.

    Fused dropout keeps a mask of one byte per entry. Attention takes flash attention in half precision without a mask,
    else memory-efficient attention; neither keeps probabilities.
    """

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.dropout, torch.dropout):
            return _fused_dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _fused_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and 0.0 < p < 1.0 else x


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    ops = torch.ops.aten
    if attn_mask is None and q.dtype.itemsize == 2:
        out: Tensor = ops._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
        return out
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = q.new_zeros(attn_mask.shape).masked_fill(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    efficient = ops._scaled_dot_product_efficient_attention
    out = efficient(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
    return out


class ComposedWeights(TorchFunctionMode):
    """Notes what PEFT makes of a bare parameter and its adapter: a weight that is there only while that adapter lives.

    ``parameters``: the adapter's index, by the parameter's memory; ``composed``: the same, by the made weight's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[int, int] = {}
        self.composed: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no address is used twice

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        out = func(*args, **(kwargs or {}))
        if func in (torch.baddbmm, Tensor.__add__, Tensor.add, torch.add) and isinstance(args[0], FakeTensor):
            index = self.parameters.get(identity(args[0]))
            if index is not None:
                self.composed[identity(out)] = index
                self._alive.append(out.detach())
        return out


class GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The grouped product of experts in any dtype: torch runs it so, and knows its shape without data for one alone."""

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        if func is torch.ops.aten._grouped_mm.default:
            rows, weights = args[:2]
            return rows.new_empty(rows.shape[0], weights.shape[-1])
        return func(*args, **(kwargs or {}))


def _is_known_mask(item: object) -> bool:
    return isinstance(item, Tensor) and not isinstance(item, FakeTensor) and item.dtype == torch.bool


def identity(tensor: Tensor) -> int:
    """Of a tensor's memory, while that lives; views share it."""
    return int(tensor.untyped_storage()._cdata)
