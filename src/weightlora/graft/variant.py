"""Our two LoRA variants: one path, over the layer's own factors or over those that a form makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.tuners.lora.layer import LoraVariant
from peft.utils.other import transpose
from torch import Tensor, nn

from weightlora.graft.adapters import factors
from weightlora.ops import AdapterPath

if TYPE_CHECKING:
    from weightlora.graft.adapters import AdapterLayer
    from weightlora.graft.forms import Form


class PathVariant(LoraVariant):
    """``y = base(x) + s B A drop(x)``, as stock LoRA, by one of our engines, in any layer kind that honours variants.

    PEFT declares these methods static and calls them on the instance; here they are plain methods, which know their
    state.
    """

    is_gate = True  # one of ours: another of ours may take its place

    def __init__(self, path: AdapterPath) -> None:
        self.path = path

    def computing(self, module: AdapterLayer, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(A, B, omega)`` as they compute now; omega is None where there is no gate."""
        return (*factors(module, name), None)

    def delta(self, module: AdapterLayer, name: str) -> Tensor:
        """What the adapter adds to the base weight, in the weight's own layout."""
        return module.get_delta_weight(name)

    def forward(self, module: AdapterLayer, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:  # type: ignore[override]
        A, B, omega = self.computing(module, active_adapter)
        dropout = module.lora_dropout[active_adapter]
        p = dropout.p if isinstance(dropout, nn.Dropout) and module.training else 0.0
        return self.path(x, result, A, B, omega, module.scaling[active_adapter], p)

    def merge_safe(self, module: AdapterLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        return orig_weight + self.delta(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: AdapterLayer, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        orig_weight.data += self.delta(module, active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: AdapterLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        return orig_weight - self.delta(module, active_adapter).to(orig_weight.dtype)


class FormVariant(PathVariant):
    """``y = base(x) + s omega B' A' drop(x)`` with what a form makes of the layer's own factors."""

    def __init__(self, form: Form, index: int, path: AdapterPath) -> None:
        super().__init__(path)
        self.form, self.index = form, index

    def supports_lora_conversion(self) -> bool:
        return False

    def computing(self, module: AdapterLayer, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        return (*self.form.effective(self.index, *factors(module, name)), self.form.gate(self.index))

    def delta(self, module: AdapterLayer, name: str) -> Tensor:
        own = factors(module, name)
        A, B, omega = self.computing(module, name)
        if A is own[0] and B is own[1]:
            delta = super().delta(module, name)
        else:
            delta = transpose(module.scaling[name] * (B @ A).detach(), module.fan_in_fan_out)
        return delta if omega is None else delta * omega.detach().to(delta)


def computing_factors(layer: AdapterLayer, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(A, B, omega)`` with which a layer computes now, whatever is on it."""
    variant = layer.lora_variant.get(name)
    return variant.computing(layer, name) if isinstance(variant, PathVariant) else (*factors(layer, name), None)
