"""The omega vector, outside the module tree, and the LoRA variant that reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weightlora.graft.adapters import Adapter, adapters, factors, lora_layers, refuse_tied
from weightlora.graft.variant import PathVariant
from weightlora.ops import AdapterPath, Engine, engine


class OmegaVariant(PathVariant):
    """``y = base(x) + s * omega_i * B A drop(x)``."""

    def __init__(self, gates: Gates, index: int, path: AdapterPath) -> None:
        super().__init__(path)
        self.gates, self.index = gates, index

    def supports_lora_conversion(self) -> bool:
        return False

    def computing(self, module: Any, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        return (*factors(module, name), self.gates.omega[self.index])

    def delta(self, module: Any, name: str) -> Tensor:
        delta = super().delta(module, name)
        return delta * self.gates.omega[self.index].detach().to(delta)


class Gates:
    """One trainable number per adapter, as one vector.

    ``omega: (n,)`` is a leaf tensor, float32, on the device of the first adapter. It is no parameter of any module:
    nothing shards, flattens, saves or clips it by accident, its gradient is one vector, and a decision costs one top-K.

    While gates are attached, the model's ``state_dict`` shows ``omega_i * B_i`` in place of ``B_i``, so whoever saves
    the model in the middle of a warm-up writes a plain LoRA adapter that computes what the live model computes.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> gates = Gates(model); gates.omega
    tensor([1.], requires_grad=True)
    >>> gates.detach()
    """

    def __init__(
        self,
        model: nn.Module,
        name: str = "default",
        *,
        value: float = 1.0,
        trainable: bool = True,
        engine_name: Engine = "autograd",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.name = model, name
        self.adapters: tuple[Adapter, ...] = adapters(model, name)
        refuse_tied(self.adapters)
        layers: list[Any] = [layer for _, layer in lora_layers(model, name)]
        device = factors(layers[0], name)[0].device
        self.omega = torch.full((len(layers),), value, dtype=dtype, device=device, requires_grad=trainable)
        self._layers = layers
        self._hooks = []
        path = engine(engine_name)
        for index, layer in enumerate(layers):
            layer.lora_variant[name] = OmegaVariant(self, index, path)
            # PEFT would copy x into the adapter's dtype for each adapter; the path casts inside and q, k, v share x.
            layer.cast_input_dtype_enabled = False
            self._hooks.append(layer.register_state_dict_post_hook(self._fold_into_state(index)))

    def _fold_into_state(self, index: int) -> Any:
        def hook(_module: nn.Module, state: dict[str, Any], prefix: str, _meta: Any) -> None:
            key = f"{prefix}lora_B.{self.name}.weight"
            state[key] = state[key] * self.omega[index].detach().to(state[key])

        return hook

    def __len__(self) -> int:
        return len(self.adapters)

    def factors(self, index: int) -> tuple[Tensor, Tensor]:
        """The live parameters ``A (r, d_in)`` and ``B (d_out, r)`` of adapter `index`."""
        return factors(self._layers[index], self.name)

    def set(self, values: Tensor) -> None:
        """Overwrite omega in place; its gradient is kept."""
        with torch.no_grad():
            self.omega.copy_(values)

    def raw_state(self) -> dict[str, Tensor]:
        """Omega and the unfolded B of every adapter: what a resume needs and a folded checkpoint does not hold."""
        state = {"omega": self.omega.detach().clone()}
        for index, adapter in enumerate(self.adapters):
            state[f"B.{adapter.name}"] = self.factors(index)[1].detach().clone()
        return state

    def load_raw_state(self, state: dict[str, Tensor]) -> None:
        """Put :meth:`raw_state` back."""
        self.set(state["omega"])
        with torch.no_grad():
            for index, adapter in enumerate(self.adapters):
                self.factors(index)[1].copy_(state[f"B.{adapter.name}"])

    def detach(self) -> None:
        """Take the gates off: every layer is PEFT's stock layer again and computes with an implicit gate of 1."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for layer in self._layers:
            layer.lora_variant.pop(self.name, None)
            layer.cast_input_dtype_enabled = True


def scalar_products(model: nn.Module, name: str = "default") -> Tensor:
    """``<dL/dW_i, s B_i A_i>`` of every adapter, from gradients that a backward pass has just left.

    With G = dL/dW the gradient of B is ``s G A^T``, so ``<dL/dB, B> = <G, s B A>`` and G itself is never formed. Where
    gates train it is the gate's own gradient, which exists at a gate of 0 too.

    Returns:
        ``(n,)`` float64 in module order, on the CPU; 0 where no gradient arrived.

    Source: paper, section 3.1: the scalar products of Figure 2.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> scalar_products(model)  # B is zero at the start
    tensor([0.], dtype=torch.float64)
    """
    found = []
    layers: list[Any] = [layer for _, layer in lora_layers(model, name)]
    for layer in layers:
        variant, B = layer.lora_variant.get(name), factors(layer, name)[1]
        if isinstance(variant, OmegaVariant) and variant.gates.omega.requires_grad:
            grad = variant.gates.omega.grad
            product = torch.zeros(()) if grad is None else grad[variant.index]
        else:
            product = torch.zeros(()) if B.grad is None else (B.grad * B.detach()).sum()
        found.append(product.double().cpu())
    return torch.stack(found)
