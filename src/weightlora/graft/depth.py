"""How far down the backward pass goes, and what it computes anew: checkpointing, and what that does to the lowest."""

from __future__ import annotations

from typing import Any

from torch import nn

from weightlora.graft.adapters import base_of

# What Transformers and PEFT call the hook that makes embeddings' outputs require gradients.
_HOOK_NAMES = ("make_inputs_require_grad", "make_inputs_require_grads")


def _stay_off() -> None:
    """Stands in for ``enable_input_require_grads``, which nothing needs once checkpointing is non-reentrant."""


def checkpoint_blocks(model: nn.Module, settings: dict[str, Any] | None = None, **layers: Any) -> None:
    """Switch gradient checkpointing on, by the name that the installed release of Transformers has for it.

    Args:
        model: of Transformers, or PEFT's around one.
        settings: keyword arguments of ``torch.utils.checkpoint``; default: Transformers' own.
        layers: ``every_n_layers``, ``offload``: which blocks, and where to; releases that know neither refuse them.
    """
    hugging: Any = model
    if hasattr(hugging, "activation_checkpointing_enable"):
        hugging.activation_checkpointing_enable(activation_checkpointing_kwargs=settings, **layers)
    else:
        hugging.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings, **layers)


def end_backward_at_lowest(model: nn.Module) -> int:
    """Undo ``enable_input_require_grads`` and keep it off.

    Gradient checkpointing (TRL's default) makes the embeddings' output require a gradient, which pulls the backward
    pass, and all that it keeps, down to the input. Once only a few adapters live, nothing below the lowest one needs
    either. Every such hook is removed, also those whose handles a second call had overwritten, and later calls do
    nothing.

    Args:
        model: the model after surgery.

    Returns:
        How many hooks were removed.
    """
    removed = 0
    for module in model.modules():
        hooks = module._forward_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__name__", "") in _HOOK_NAMES]:
            del hooks[key]
            removed += 1
    base: Any = base_of(model)
    if hasattr(base, "enable_input_require_grads"):
        base.enable_input_require_grads = _stay_off
    return removed
