"""Whether a model's adapters can be trained as they stand; what would train nothing is named before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import nn

from weightlora.errors import AdapterError
from weightlora.graft.adapters import factors, lora_layers


def check_ready(model: nn.Module, name: str) -> None:
    """Refuse adapters that do not compute, or that cannot learn.

    Raises:
        AdapterError: some are merged into the base, switched off, not active, or frozen.
    """
    layers = list(lora_layers(model, name))
    frozen = [path for path, layer in layers if not any(p.requires_grad for p in factors(layer, name))]
    # A frozen A is LoRA-FA; under a frozen B of zeros an adapter is zero, and A has no gradient.
    stuck = [
        path
        for path, layer in layers
        if path not in frozen and not factors(layer, name)[1].requires_grad and not torch.any(factors(layer, name)[1])
    ]
    for found, what, remedy in (
        ([path for path, layer in layers if layer.merged], "merged into the base", "model.unmerge_adapter()"),
        ([path for path, layer in layers if layer.disable_adapters], "off", "model.enable_adapter_layers()"),
        (
            [path for path, layer in layers if name not in layer.active_adapters],
            "not active",
            f"model.set_adapter({name!r})",
        ),
        (
            frozen,
            "frozen",
            "set requires_grad of A and B (is_trainable=True where PEFT loads them), or leave those layers out of"
            " target_modules",
        ),
        (stuck, "zero with a frozen B", "let B train"),
    ):
        if found:
            raise AdapterError(
                f"{len(found)} of {len(layers)} adapters are {what} and would learn nothing ({few(found)});"
                f" {'call ' if remedy.startswith('model.') else ''}{remedy}"
            )


def check_peft_model(model: nn.Module) -> None:
    """Refuse adapters that Transformers injected: its trainer cannot read a checkpoint of theirs back.

    Raises:
        AdapterError: the model is no ``PeftModel``.
    """
    if not isinstance(model, PeftModel):
        raise AdapterError(
            f"the adapters of this {type(model).__name__} were injected (model.add_adapter), and Transformers' trainer"
            " cannot go on from a checkpoint of such a model; use peft.get_peft_model(model, LoraConfig(...)), or"
            " weightlora.attach in a loop of your own"
        )


def check_held(model: nn.Module, name: str, held: Sequence[nn.Parameter]) -> None:
    """Refuse an optimizer that lacks factors which ask for gradients: they would be ranked by what they never did.

    Args:
        model: with adapter `name`.
        name: PEFT's adapter name.
        held: the parameters of the optimizer.

    Raises:
        AdapterError: some are missing; the message says which.
    """
    known = {id(p) for p in held}
    wanted = [
        (path, half, p)
        for path, layer in lora_layers(model, name)
        for half, p in zip("AB", factors(layer, name), strict=True)
        if p.requires_grad
    ]
    missing = [(path, half) for path, half, p in wanted if id(p) not in known]
    if not missing:
        return
    halves = {half for _, half in missing}
    if len(missing) == len(wanted):
        raise AdapterError(
            "the optimizer holds no adapter of this model; make it of the model's parameters that require gradients,"
            " after peft.get_peft_model"
        )
    if len(halves) == 1 and len(missing) == sum(half in halves for _, half, _ in wanted):
        (half,) = halves
        raise AdapterError(
            f"the optimizer holds the other half of the adapters but no {half}; one optimizer must hold both (as two"
            f" parameter groups, say), or freeze {half}"
        )
    raise AdapterError(
        f"the optimizer lacks {len(missing)} of the {len(wanted)} factors of adapters that require gradients"
        f" ({few([f'{half} of {path}' for path, half in missing])}); one optimizer must hold all of them, or leave"
        " those layers out of target_modules"
    )


def few(names: Sequence[str]) -> str:
    """The first names of many, for a message.

    >>> few(["a", "b"]), few(["a", "b", "c", "d"])
    ('a, b', 'a, b, c, ...')
    """
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
