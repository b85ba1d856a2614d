"""What can be seen only while the model computes: the size of an adapter's output, the dense gradient of its update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from weightlora.graft.adapters import factors, lora_layers
from weightlora.graft.variant import computing_factors


@contextlib.contextmanager
def output_energy(model: nn.Module, name: str = "default") -> Iterator[Tensor]:
    """Add up ``sum over tokens of ||dW_i x||^2`` of every adapter while the model runs, each on its layer's own input.

    Yields:
        ``(n,)`` float64 in module order, filled in place; ``dW x = s B (A x)`` is never a dense matrix.
    """
    layers: list[Any] = [layer for _, layer in lora_layers(model, name)]
    total = torch.zeros(len(layers), dtype=torch.float64)

    def hook(index: int) -> Any:
        def see(layer: Any, inputs: tuple[Any, ...], _output: Any) -> None:
            with torch.no_grad():
                A, B, _ = computing_factors(layer, name)
                h = inputs[0].to(A.dtype) @ A.T
                gram = (B.T @ B).double()
                h = h.reshape(-1, h.shape[-1]).double()
                total[index] += float(layer.scaling[name] ** 2 * ((h @ gram) * h).sum())

        return see

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def input_size(model: nn.Module, name: str = "default") -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Add up ``sum over tokens of |x_j|`` of every adapted layer's inputs while the model runs, padding included.

    Yields:
        For each adapter in module order the sums ``(d_in,)`` float32 and the number of tokens ``()``, filled in place.
    """
    layers: list[Any] = [layer for _, layer in lora_layers(model, name)]
    sums = []
    for layer in layers:
        A = factors(layer, name)[0]
        sums.append((torch.zeros(A.shape[1], device=A.device), torch.zeros((), device=A.device)))

    def hook(index: int) -> Any:
        def see(_layer: Any, inputs: tuple[Any, ...], _output: Any) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float().abs()
            sums[index][0].add_(x.sum(0))
            sums[index][1].add_(x.shape[0])

        return see

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


class ProductWatch:
    """``sum of |dW * dL/ddW|`` of every adapter, summed over the backward passes since :meth:`take`.

    The dense gradient ``G = g^T x`` and update ``dW = s B A`` are formed for one module at a time, inside its backward
    hook, and let go at once; the absolute value allows no factored shortcut. Under gradient accumulation the sums of
    the micro-batches add up.

    Source: the score of IncreLoRA, before its normalisation.
    """

    def __init__(self, model: nn.Module, name: str = "default") -> None:
        self.name = name
        self._layers: list[Any] = [layer for _, layer in lora_layers(model, name)]
        device = factors(self._layers[0], name)[0].device
        self.products = torch.zeros(len(self._layers), dtype=torch.float64, device=device)
        self._handles = [layer.register_forward_hook(self._see(index)) for index, layer in enumerate(self._layers)]

    def _see(self, index: int) -> Any:
        def forward(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not (torch.is_grad_enabled() and output.requires_grad and layer.training):
                return
            x = inputs[0].detach()

            def backward(grad: Tensor) -> None:
                A, B, _ = computing_factors(layer, self.name)
                G = grad.reshape(-1, grad.shape[-1]).to(A.dtype).T @ x.reshape(-1, x.shape[-1]).to(A.dtype)
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
