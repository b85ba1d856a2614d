"""The lean adapter path on plain LoRA layers, without gates: put on and taken off, and nothing else changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal, cast, get_args

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from weightlora.errors import ConfigError
from weightlora.graft.adapters import adapter_name, honours_variants, lora_layers
from weightlora.graft.variant import PathVariant
from weightlora.ops import Engine, engine
from weightlora.ops.autograd import AdapterFunction, Seed, TorchProducts

PathName = Literal["auto", "autograd", "triton", "reference", "stock"]
PATHS: tuple[str, ...] = get_args(PathName)


def check_path(name: str) -> Engine:
    """The engine for gated layers under an adapter path: "stock" has none, and "reference" computes what it would.

    Raises:
        ConfigError: the path is unknown, or cannot run here.

    >>> check_path("stock"), check_path("autograd")
    ('reference', 'autograd')
    """
    if name not in PATHS:
        raise ConfigError(f"engine {name!r} is unknown; use one of {', '.join(PATHS)}")
    chosen = cast("Engine", "reference" if name == "stock" else name)
    engine(chosen)
    return chosen


def _is_plain(layer: LoraLayer, name: str) -> bool:
    """Stock LoRA in a layer kind whose forward asks for variants."""
    variant = layer.lora_variant.get(name)
    return (
        honours_variants(layer) and not layer.lora_bias.get(name) and (variant is None or type(variant) is PathVariant)
    )


def _cast_outside(layer: LoraLayer) -> bool:
    """Whether PEFT must go on casting x before the forward: another adapter of the layer is not ours."""
    return not all(getattr(layer.lora_variant.get(name), "is_gate", False) for name in layer.lora_A)


def fast_path(model: nn.Module, name: str | None = None, engine_name: Engine = "auto") -> int:
    """Compute every plain LoRA adapter by our path: same result, fewer bytes kept and fewer passes over the output.

    For ungated training: a LoRA baseline, and what is left after the seam. Parameters, state dict, saving, merging and
    switching adapters are those of the stock layers. Gates may be attached afterwards; they take this variant's place.

    Args:
        model: a model with LoRA adapters.
        name: PEFT's adapter name; default: the active one.
        engine_name: as in :func:`weightlora.ops.engine`.

    Returns:
        How many adapters now take the path. What computes something else (DoRA, a bias in B, gates) is left alone.

    Raises:
        AdapterError: there are no adapters, or none called `name`.
        ConfigError: the engine cannot run here.

    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> fast_path(model, engine_name="autograd"), stock_path(model)
    (1, 1)
    """
    name = adapter_name(model, name)
    path = engine(engine_name)
    changed = 0
    for _, layer in lora_layers(model, name):
        if _is_plain(layer, name):
            layer.lora_variant[name] = PathVariant(path)
            # PEFT would copy x into the adapter's dtype, once per adapter; the path casts inside, and q, k, v share x.
            layer.cast_input_dtype_enabled = _cast_outside(layer)
            changed += 1
    return changed


def stock_path(model: nn.Module, name: str | None = None) -> int:
    """Undo :func:`fast_path`: PEFT's own forward computes again. Gates stay on.

    Returns:
        How many adapters were changed back.
    """
    name = adapter_name(model, name)
    changed = 0
    for _, layer in lora_layers(model, name):
        if type(layer.lora_variant.get(name)) is PathVariant:
            del layer.lora_variant[name]
            layer.cast_input_dtype_enabled = _cast_outside(layer)
            changed += 1
    return changed


@contextlib.contextmanager
def observed_path(
    model: nn.Module, name: str, note: Callable[[Tensor], None], drops: Callable[[int], None]
) -> Iterator[None]:
    """Compute every adapter by our path, over tensors that may have no data, for somebody who looks on.

    Args:
        model: with LoRA adapters.
        name: PEFT's adapter name.
        note: called with each ``h = A x``.
        drops: called with the index of each adapter that would drop something; nothing is dropped, no seed is drawn.
    """
    layers = [layer for _, layer in lora_layers(model, name)]
    before = [(layer.lora_variant.get(name), layer.cast_input_dtype_enabled) for layer in layers]
    for index, layer in enumerate(layers):
        layer.lora_variant[name] = _ObservedVariant(note, drops, index)
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, (variant, cast) in zip(layers, before, strict=True):
            layer.lora_variant.pop(name)
            if variant is not None:
                layer.lora_variant[name] = variant
            layer.cast_input_dtype_enabled = cast


class _ObservedProducts(TorchProducts):
    def __init__(self, note: Callable[[Tensor], None]) -> None:
        self.note = note

    def down(self, x: Tensor, A: Tensor, dtype: torch.dtype, p: float, seed: Seed) -> Tensor:
        h = super().down(x, A, dtype, 0.0, seed)
        self.note(h)
        return h


class _ObservedVariant(PathVariant):
    def __init__(self, note: Callable[[Tensor], None], drops: Callable[[int], None], index: int) -> None:
        products = _ObservedProducts(note)

        def path(
            x: Tensor, result: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, scale: float, dropout: float = 0.0
        ) -> Tensor:
            if dropout > 0.0:
                drops(index)
            in_place = result.grad_fn is not None and result.is_contiguous()
            out: Tensor = AdapterFunction.apply(x, result, A, B, gate, scale, 0.0, in_place, products)  # type: ignore[no-untyped-call]
            return out

        super().__init__(path)
