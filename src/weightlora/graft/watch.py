"""What can be seen only while the model computes: sizes of inputs and outputs, features of blocks, dense gradients.

Each function but :class:`ProductWatch` is a context: what it yields is filled in place while the model runs inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from weightlora.core.published import alignment
from weightlora.graft.adapters import adapters, base_of, block_path, factors, lora_layers
from weightlora.graft.quantised import whole_weight
from weightlora.graft.variant import computing_factors

if TYPE_CHECKING:
    from weightlora.graft.adapters import AdapterLayer

M = TypeVar("M", bound=nn.Module)
Hook: TypeAlias = Callable[[M, tuple[Tensor, ...], Tensor], None]
HookOfAll: TypeAlias = Callable[[M, tuple[Tensor, ...], dict[str, Tensor], Tensor | tuple[Tensor, ...]], None]


@contextlib.contextmanager
def _each(
    layers: Sequence[M], hook: Callable[[int], Hook[M] | HookOfAll[M]], *, with_kwargs: bool = False
) -> Iterator[None]:
    """A forward hook on every module, made for its place in the list."""
    handles = [layer.register_forward_hook(hook(index), with_kwargs=with_kwargs) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def output_energy(model: nn.Module, name: str = "default") -> Iterator[Tensor]:
    """Add up ``sum over tokens of ||dW_i x||^2`` of every adapter while the model runs, each on its layer's own input.

    Yields:
        ``(n,)`` float64 in module order, filled in place; ``dW x = s B (A x)`` is never a dense matrix.
    """
    layers = [layer for _, layer in lora_layers(model, name)]
    total = torch.zeros(len(layers), dtype=torch.float64)

    def hook(index: int) -> Hook[AdapterLayer]:
        def see(layer: AdapterLayer, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            with torch.no_grad():
                A, B, _ = computing_factors(layer, name)
                h = inputs[0].to(A.dtype) @ A.T
                gram = (B.T @ B).double()
                h = h.reshape(-1, h.shape[-1]).double()
                total[index] += float(layer.scaling[name] ** 2 * ((h @ gram) * h).sum())

        return see

    with _each(layers, hook):
        yield total


@contextlib.contextmanager
def input_size(model: nn.Module, name: str = "default") -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Add up ``sum over tokens of |x_j|`` of every adapted layer's inputs while the model runs, padding included.

    Yields:
        For each adapter in module order the sums ``(d_in,)`` float32 and the number of tokens ``()``, filled in place.
    """
    layers = [layer for _, layer in lora_layers(model, name)]
    sums = []
    for layer in layers:
        A = factors(layer, name)[0]
        sums.append((torch.zeros(A.shape[1], device=A.device), torch.zeros((), device=A.device)))

    def hook(index: int) -> Hook[nn.Module]:
        def see(_layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float().abs()
            sums[index][0].add_(x.sum(0))
            sums[index][1].add_(x.shape[0])

        return see

    with _each(layers, hook):
        yield sums


@contextlib.contextmanager
def feature_alignment(model: nn.Module, name: str = "default") -> Iterator[Tensor]:
    """Note ``mean ||W z|| / (||W||_F mean ||z|| / sqrt(d_in))`` over all tokens of every adapted layer, padding too.

    Yields:
        ``(n,)`` float64 in module order, filled in place; see :func:`weightlora.core.published.alignment`.
    """
    layers = [layer for _, layer in lora_layers(model, name)]
    found = torch.zeros(len(layers), dtype=torch.float64)

    def hook(index: int) -> Hook[nn.Module]:
        def see(base: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            y, x = output.detach().float(), inputs[0].detach().float()
            if (bias := getattr(base, "bias", None)) is not None:
                y = y - bias.detach().float()
            # In the hook, where a base that FSDP shards is whole.
            W = whole_weight(layers[index])
            found[index] = float(alignment(y.norm(dim=-1).mean(), x.norm(dim=-1).mean(), W))

        return see

    with _each([layer.get_base_layer() for layer in layers], hook):
        yield found


@contextlib.contextmanager
def block_features(model: nn.Module, name: str = "default") -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Note what goes into every block that holds adapters, and what comes out: the mean over each row's tokens.

    Padding is left out where the model is given an ``attention_mask`` of the features' own length.

    Yields:
        For each block in module order ``(rows, width)`` float32 twice, set while the model runs.
    """
    paths = list(dict.fromkeys(path for a in adapters(model, name) if (path := block_path(a.name)) is not None))
    found = [(torch.empty(0), torch.empty(0)) for _ in paths]
    masks: list[Tensor | None] = [None]

    def note_mask(_model: object, _args: object, kwargs: dict[str, Tensor]) -> None:
        masks[0] = kwargs.get("attention_mask")

    def pooled(x: Tensor) -> Tensor:
        x, mask = x.detach().float(), masks[0]
        if mask is None or mask.shape != x.shape[:2]:
            return x.mean(1)
        weights = mask.to(x).unsqueeze(-1)
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1)

    def hook(index: int) -> HookOfAll[nn.Module]:
        def see(
            _block: nn.Module,
            args: tuple[Tensor, ...],
            kwargs: dict[str, Tensor],
            output: Tensor | tuple[Tensor, ...],
        ) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            found[index] = pooled(before), pooled(after)

        return see

    handle = model.register_forward_pre_hook(note_mask, with_kwargs=True)
    try:
        with _each([base_of(model).get_submodule(path) for path in paths], hook, with_kwargs=True):
            yield found
    finally:
        handle.remove()


@contextlib.contextmanager
def dense_gradients(model: nn.Module, name: str = "default", *, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Show ``dL/dW = g^T x`` of every adapted layer, by its index, while a loss goes backward through the model.

    Args:
        model: with plain adapters.
        name: of PEFT's adapter.
        see: is given the index and the gradient ``(d_out, d_in)``, float32, which is formed for one layer at a time.
    """
    layers = [layer for _, layer in lora_layers(model, name)]

    def hook(index: int) -> Hook[nn.Module]:
        def forward(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            if torch.is_grad_enabled() and output.requires_grad:
                output.register_hook(lambda grad: see(index, _dense(grad, x, torch.float32)))  # type: ignore[no-untyped-call]

        return forward

    with _each(layers, hook):
        yield


def _dense(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``g^T x`` over all tokens, (d_out, d_in)."""
    return grad.reshape(-1, grad.shape[-1]).to(dtype).T @ x.reshape(-1, x.shape[-1]).to(dtype)


class ProductWatch:
    """``sum of |dW * dL/ddW|`` of every adapter, summed over the backward passes since :meth:`take`.

    The dense gradient ``G = g^T x`` and update ``dW = s B A`` are formed for one module at a time, inside its backward
    hook, and let go at once; the absolute value allows no factored shortcut. Under gradient accumulation the sums of
    the micro-batches add up.

    Source: the score of IncreLoRA, before its normalisation.
    """

    def __init__(self, model: nn.Module, name: str = "default") -> None:
        self.name = name
        self._layers = [layer for _, layer in lora_layers(model, name)]
        device = factors(self._layers[0], name)[0].device
        self.products = torch.zeros(len(self._layers), dtype=torch.float64, device=device)
        self._handles = [layer.register_forward_hook(self._see(index)) for index, layer in enumerate(self._layers)]

    def _see(self, index: int) -> Hook[AdapterLayer]:
        def forward(layer: AdapterLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not (torch.is_grad_enabled() and output.requires_grad and layer.training):
                return
            x = inputs[0].detach()

            def backward(grad: Tensor) -> None:
                A, B, _ = computing_factors(layer, self.name)
                G = _dense(grad, x, A.dtype)
                self.products[index] += layer.scaling[self.name] * ((B @ A).detach() * G).abs().sum().double()

            output.register_hook(backward)  # type: ignore[no-untyped-call]

        return forward

    def take(self) -> Tensor:
        """The sums so far, ``(n,)`` float64; they start again from zero."""
        taken = self.products.clone()
        self.products.zero_()
        return taken

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
