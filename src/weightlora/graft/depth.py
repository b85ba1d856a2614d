"""How far down the backward pass goes, and what it computes anew: checkpointing, and what that does to the lowest."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from weightlora.graft.adapters import base_of, factors, lora_layers

# What Transformers and PEFT call the hook that makes embeddings' outputs require gradients.
_HOOK_NAMES = ("make_inputs_require_grad", "make_inputs_require_grads")
# What Transformers keeps on a module about checkpointing, and about those hooks.
_SWITCH, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"
_ENABLE = "enable_input_require_grads"
_ATTRIBUTES = (_SWITCH, _FUNCTION, _ENABLE, "_require_grads_hooks", "_require_grads_hook")


def _stay_off() -> None:
    """Stands in for ``enable_input_require_grads``, which nothing needs once checkpointing is non-reentrant."""


def checkpoint_blocks(model: nn.Module, settings: dict[str, object] | None = None, **layers: object) -> None:
    """Switch gradient checkpointing on, by the name that the installed release of Transformers has for it.

    Args:
        model: of Transformers, or PEFT's around one.
        settings: keyword arguments of ``torch.utils.checkpoint``; default: Transformers' own.
        layers: ``every_n_layers``, ``offload``: which blocks, and where to; releases that know neither refuse them.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs=settings, **layers)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings, **layers)  # type: ignore[operator]


def checkpointed_every(model: nn.Module) -> int:
    """Every how many-th block the model itself checkpoints now; 0: none.

    >>> checkpointed_every(nn.Sequential())
    0
    """
    blocks = [
        block.gradient_checkpointing for block in model.modules() if isinstance(block, GradientCheckpointingLayer)
    ]
    return -(-len(blocks) // sum(blocks)) if any(blocks) else 0


def end_backward_at_lowest(model: nn.Module) -> int:
    """Undo ``enable_input_require_grads`` and keep it off, and make gradient checkpointing non-reentrant.

    Gradient checkpointing (TRL's default, PEFT's ``prepare_model_for_kbit_training``) makes the embeddings' output
    require a gradient, which pulls the backward pass, and all that it keeps, down to the input. Once only a few
    adapters live, nothing below the lowest one needs either. Every such hook is removed, also those whose handles a
    second call had overwritten, and later calls do nothing. Reentrant checkpointing gives no gradient to a block whose
    input needs none, which the lowest live one is now; it is switched on the model itself, block by block, and all
    its other settings stay. Call it again after whoever has switched checkpointing on again.

    Where a block is checkpointed in a way that is not known here (code of its own), nothing is changed: the backward
    pass goes to the input, and every adapter has its gradient.

    Args:
        model: the model after surgery. :class:`BackwardDepth` puts back what this changes.

    Returns:
        How many hooks were removed.
    """
    functions = {module: _non_reentrant(module) for module in model.modules() if vars(module).get(_SWITCH)}
    if None in functions.values():
        return 0
    for module, function in functions.items():
        setattr(module, _FUNCTION, function)
    removed = 0
    for module in model.modules():
        hooks = module._forward_hooks
        for key in [key for key, hook in hooks.items() if _is_input_hook(hook)]:
            del hooks[key]
            removed += 1
    base = base_of(model)
    if hasattr(base, _ENABLE):
        setattr(base, _ENABLE, _stay_off)
    return removed


def _is_input_hook(hook: object) -> bool:
    return getattr(hook, "__name__", "") in _HOOK_NAMES


def _non_reentrant(module: nn.Module) -> object:
    """The function by which a module checkpoints, without reentry; None where it is not known how."""
    function = getattr(module, _FUNCTION, None)
    if function is checkpoint:
        return functools.partial(checkpoint, use_reentrant=False)
    if isinstance(function, functools.partial) and (
        function.func is checkpoint or "use_reentrant" in function.keywords
    ):
        if function.keywords.get("use_reentrant") is False:
            return function
        return functools.partial(function.func, *function.args, **{**function.keywords, "use_reentrant": False})
    return None


class BackwardDepth:
    """What decides how far down a model's backward pass goes, as it is now: hooks on embeddings, and checkpointing.

    Args:
        model: any model.

    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    >>> checkpoint_blocks(model, {"use_reentrant": True})
    >>> before = BackwardDepth(model)
    >>> end_backward_at_lowest(model)
    1
    >>> before.restore()
    >>> end_backward_at_lowest(model)
    1
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (module, dict(module._forward_hooks), {k: v for k, v in vars(module).items() if k in _ATTRIBUTES})
            for module in model.modules()
        ]

    def restore(self) -> None:
        """Put it back. Hooks of others, and handles on any hook, stay as they are."""
        for module, hooks, attributes in self._modules:
            now = dict(module._forward_hooks)
            if any(_is_input_hook(hook) for hook in (*hooks.values(), *now.values())):
                module._forward_hooks.clear()  # handles refer to this very dict
                module._forward_hooks.update(
                    {key: hook for key, hook in hooks.items() if key in now or _is_input_hook(hook)}
                )
                module._forward_hooks.update(
                    {key: hook for key, hook in now.items() if key not in hooks and not _is_input_hook(hook)}
                )
            for name in _ATTRIBUTES:
                vars(module).pop(name, None)
            vars(module).update(attributes)


class GradientCheck:
    """Whether the next backward pass brings a gradient to every live adapter.

    A layer that the pass does not go through (an expert without a token, a dropped layer) may well have none. So the
    layers are watched until :meth:`unreached` is asked, once.

    Args:
        model: after surgery.
        name: PEFT's adapter name.
        watched: False where the model is compiled, which a watch would do twice: every layer counts as gone through.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> check = GradientCheck(model)
    >>> _ = model(torch.ones(1, 4))
    >>> check.unreached()
    ['0']
    """

    def __init__(self, model: nn.Module, name: str = "default", *, watched: bool = True) -> None:
        self.name, self.layers = name, dict(lora_layers(model, name))
        self._called: set[int] = set()
        modules = [base_of(model), *self.layers.values()] if watched else []
        self._handles = [module.register_forward_hook(self._note) for module in modules]

    def _note(self, module: nn.Module, *_: object) -> None:
        if module.training and not torch.compiler.is_compiling():
            self._called.add(id(module))

    def close(self) -> None:
        """End the watch."""
        for handle in self._handles:
            handle.remove()

    def unreached(self) -> list[str]:
        """Adapters that computed, and one of whose trained factors has no gradient; the watch ends."""
        self.close()
        layers = self.layers.items()
        # Where not even the model was seen computing (nobody watched, it was called by a part), every layer counts.
        return [
            path
            for path, layer in layers
            if (id(layer) in self._called or not self._called)
            and any(p.requires_grad and p.grad is None for p in factors(layer, self.name))
        ]
