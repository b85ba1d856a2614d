"""What quantised layers need, so that a model can be evaluated and go on training, and be copied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from weightlora.errors import AdapterError
from weightlora.graft.adapters import bare_parameter, experts_of, is_sharded, linear_shape, lora_layers


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
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
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


def whole_weight(layer: LoraLayer) -> Tensor:
    """The frozen weight under an adapter as numbers: dequantised, and whole where FSDP has sharded it; to be read only.

    Returns:
        ``(d_out, d_in)``; of experts the stack as it is, ``(experts, ..., ...)``.

    Raises:
        AdapterError: the layer keeps no weight that can be read (GPTQ).
    """
    base: Any = layer.get_base_layer()
    if experts_of(layer) is not None:
        weight: Any = bare_parameter(layer)
    elif hasattr(getattr(base, "weight", None), "SCB"):
        # bitsandbytes' 8 bits, with the scales where its last forward has put them; PEFT's helper would replace the
        # parameter, and lose what training needs.
        scales = base.weight.SCB if base.state.SCB is None else base.state.SCB
        weight = base.weight.data * scales.unsqueeze(1) / 127
    elif isinstance(getattr(base, "weight", None), Tensor) or hasattr(base, "W_q"):
        weight = dequantize_module_weight(base)
    else:
        weight = None
    if weight is not None and is_sharded(weight):
        weight = weight.full_tensor()
    if isinstance(base, Conv1D):
        weight = weight.T
    shape = linear_shape(base)
    if weight is None or (shape is not None and tuple(weight.shape) != shape[::-1]):
        raise AdapterError(
            f"the weights of a {type(base).__name__} cannot be read as numbers; use an unquantised base, or one by"
            " bitsandbytes, HQQ or torchao"
        )
    found: Tensor = weight.detach()
    return found


def whole_weights(model: nn.Module, name: str) -> Iterator[Tensor]:
    """:func:`whole_weight` of every adapter in module order, one at a time."""
    return (whole_weight(layer) for _, layer in lora_layers(model, name))
