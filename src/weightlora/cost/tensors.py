"""Bytes in closed form: what weights, gradients and optimizers take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from weightlora.errors import ConfigError

# Bytes that bitsandbytes keeps for a weight of n numbers in d_out rows, by the name of a quantisation.
QUANTIZATIONS = ("8bit", "4bit", "4bit-double")
# Optimizers by the names of ``TrainingArguments.optim``, and which rule of `optimizer_bytes` they follow.
OPTIMIZERS: Mapping[str, str] = MappingProxyType(
    {
        "adamw_torch": "adam", "adamw_torch_fused": "adam", "sgd": "sgd", "adafactor": "adafactor",
        "adamw_bnb_8bit": "adam8", "adamw_8bit": "adam8", "paged_adamw_8bit": "paged", "paged_adamw_32bit": "paged",
        "adagrad": "one", "rmsprop": "one",
    }
)  # fmt: skip


Shaped = tuple[tuple[int, ...], int]
"""Of a tensor: its shape, and the bytes of each number."""


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors, each once.

    >>> import torch
    >>> t = torch.zeros(3); tensor_bytes([t, t, torch.zeros(2, dtype=torch.bfloat16)])
    16
    """
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def weight_bytes(model: nn.Module, quantization: str | None) -> int:
    """Bytes of what does not train: frozen parameters, as :func:`frozen_bytes` has them, and buffers."""
    return frozen_bytes(model, quantization) + tensor_bytes(list(model.buffers()))


def frozen_bytes(model: nn.Module, quantization: str | None, within: str = "") -> int:
    """Bytes of frozen parameters, all or those whose names begin with `within`.

    Quantised is what bitsandbytes quantises: the linear layers in the model's blocks. "8bit": one byte a number and a
    float32 scale per row. "4bit": half a byte and a float32 scale per 64 numbers; "4bit-double": these scales in one
    byte each, with a float32 per 256 of them.
    """
    quantised: dict[int, int] = {}
    if quantization is not None:
        for path, module in model.named_modules():
            if not path.startswith(within):
                continue
            if isinstance(module, nn.Linear) and not module.weight.requires_grad and _in_block(path):
                quantised[id(module.weight)] = _quantised(module.weight.numel(), module.out_features, quantization)
    frozen = {id(p): p for name, p in model.named_parameters() if name.startswith(within) and not p.requires_grad}
    return tensor_bytes([p for key, p in frozen.items() if key not in quantised]) + sum(quantised.values())


def _in_block(path: str) -> bool:
    return any(part.isdigit() for part in path.split(".")) and "lora_" not in path


def _quantised(count: int, rows: int, quantization: str) -> int:
    if quantization == "8bit":
        return count + 4 * rows
    blocks = math.ceil(count / 64)
    code = 4 * 16
    if quantization == "4bit":
        return math.ceil(count / 2) + 4 * blocks + code
    return math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * 256 + 4 + code


def optimizer_bytes(name: str, shapes: Sequence[Shaped]) -> int:
    """Bytes of an optimizer's state after its first step.

    Args:
        name: as in ``TrainingArguments.optim``.
        shapes: of each trained tensor.

    "adamw_*": two moments in the tensor's dtype and a float32 step; 8-bit: one byte each where a tensor has 4,096
    numbers or more, with a float32 scale per 256. "adafactor" as Transformers sets it up: a float32 per row, per column
    and for the tensor's size. "paged_*" keep theirs in the host's memory.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"the optimizer {name!r} is not known to the planner; use one of {', '.join(OPTIMIZERS)}")
    return sum(_state(OPTIMIZERS[name], shape, width) for shape, width in shapes)


def _state(kind: str, shape: tuple[int, ...], width: int) -> int:
    count = math.prod(shape)
    if kind == "adam":
        return 2 * count * width + 4
    if kind == "adam8":
        return 8 * count if count < 4096 else 2 * (count + 4 * math.ceil(count / 256))
    if kind == "adafactor":
        moments = (shape[-1] + shape[-2]) * math.prod(shape[:-2]) if len(shape) >= 2 else count
        return 4 * moments + 4
    if kind == "one":
        return count * width + 4
    return 0


def shapes_of(tensors: Sequence[Tensor]) -> list[Shaped]:
    """The shape and the bytes per number of each."""
    return [(tuple(t.shape), t.element_size()) for t in tensors]
