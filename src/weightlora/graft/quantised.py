"""What quantised layers need, so that a model can be evaluated and go on training, and be copied."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def keep_unpacked(model: nn.Module) -> int:
    """Keep bitsandbytes from packing its 4-bit layers for inference on a CPU, and unpack those that are packed.

    On a CPU with AVX512-BF16 a layer packs its weight in place when it is first evaluated. A packed layer gives its
    input no gradient, also when it trains afterwards, and rounds to bfloat16. What packing has rounded stays rounded.

    Args:
        model: any model.

    Returns:
        How many layers were packed.

    Source: bitsandbytes 0.50, ``Linear4bit.forward`` and ``matmul_4bit``.
    """
    unpacked = 0
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()  # restores the layout that is saved, in place
            unpacked += 1
    return unpacked


def holds_more_than_data(model: nn.Module) -> str | None:
    """The name of a parameter that cannot be stood in for by its shape and dtype alone; None if there is none.

    8-bit parameters of bitsandbytes hold codes and scales beside their data, torchao's are made of several tensors.
    """
    return next((name for name, p in model.named_parameters() if hasattr(p, "SCB") or stored(p)[0] is not p), None)


def stored(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold a tensor's numbers: itself, or the parts of one of torchao's.

    >>> import torch
    >>> x = torch.ones(2)
    >>> stored(x)[0] is x
    True
    """
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in stored(getattr(tensor, name))]
