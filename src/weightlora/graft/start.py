"""What a model was before training: what an initialisation took out of its base, and its buffers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weightlora.errors import AdapterError
from weightlora.graft.adapters import base_layer, base_of, factors, linear_shape, lora_layers
from weightlora.graft.quantised import stored

# What `init_lora_weights` may be: those that leave the base's weights alone, and those that take s B A out of them.
_LEAVE = ("gaussian", "eva", "orthogonal", "mica")
_TAKE = ("pissa", "olora", "corda", "lora_ga")
# Where the notes lie: on the module that holds A, which goes when the adapter goes, and on the model.
_TAKEN, _BUFFERS = "_weightlora_taken", "_weightlora_buffers"
# How far initial factors are from fitting their base, as a share of what they could be.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Taken:
    """``s B A`` that an initialisation took out of a base weight: the factors as they were before training."""

    A: Tensor
    B: Tensor
    scale: float

    def product(self, base: nn.Linear | Conv1D) -> Tensor:
        """``s B A`` in the layout of the base layer's weight, multiplied in PEFT's order."""
        device = base.weight.device
        delta = (self.scale * self.B.to(device)) @ self.A.to(device)
        return delta.T if isinstance(base, Conv1D) else delta


def moved_by(model: nn.Module, name: str) -> str | None:
    """The initialisation of adapter `name`, if it moves the weights of the base; None if it leaves them alone.

    Source: PEFT 0.20 and 0.21, ``LoraLayer.update_layer``.
    """
    init = getattr(model, "peft_config", {})[name].init_lora_weights
    return init if isinstance(init, str) and init.lower() not in _LEAVE else None


def note_start(model: nn.Module, name: str) -> None:
    """Note, before the first step, what cannot be known after it. What was noted before stays.

    Of adapters whose initialisation moved the base a copy of A and B is kept, which are small; of buffers a hash.

    Raises:
        AdapterError: what the initialisation took could not be given back exactly.
    """
    if _BUFFERS not in model.__dict__:
        setattr(model, _BUFFERS, dict(_hashes(model)))
    init = moved_by(model, name)
    if init is None:
        return
    for path, layer in lora_layers(model, name):
        if taken(layer, name) is None:
            _check_returnable(path, layer, name, init)
            A, B = (factor.detach().clone() for factor in factors(layer, name))
            setattr(layer.lora_A[name], _TAKEN, Taken(A, B, float(layer.scaling[name])))


def _check_returnable(path: str, layer: LoraLayer, name: str, init: str) -> None:
    said = f"init_lora_weights={init!r} moved a part of the base into the adapters"
    if not init.lower().startswith(_TAKE):
        raise AdapterError(
            f"{said}, and for this value the part is not known exactly; use init_lora_weights=True, 'pissa' or 'olora'"
        )
    weight = getattr(layer.get_base_layer(), "weight", None)
    if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in (torch.float32, torch.float64):  # type: ignore[union-attr]
        kind = getattr(weight, "dtype", type(weight).__name__)
        raise AdapterError(
            f"{said}, and the base weight of {path} ({kind}) rounds too much for it to be added back exactly; load the"
            " base with dtype=torch.float32 (--dtype float32; bf16=True still computes in bfloat16), or use"
            " init_lora_weights=True"
        )
    if len(layer.lora_A) > 1:
        raise AdapterError(
            f"{said}, and {path} holds {len(layer.lora_A)} adapters, so adding it back would change the others;"
            " use init_lora_weights=True, or one adapter"
        )
    if not _is_initial(layer, name, init):
        raise AdapterError(
            f"{said}, and the adapter on {path} is no longer at its initial values, so that part is not"
            " known; start from a fresh get_peft_model(...), and load trained weights (or resume) after that"
        )


def _is_initial(layer: LoraLayer, name: str, init: str) -> bool:
    """Whether B still fits what the initialisation left of W.

    ``B^T W`` is 0 or, by OLoRA, which takes s times its QR factors, ``(1 - s) A``. By LoRA-GA, which looks at gradients
    and not at W, ``B^T B`` is diagonal.
    """
    base = base_layer(layer)
    scale = float(layer.scaling[name])
    A, B = (factor.detach().float() for factor in factors(layer, name))
    if init.lower() == "lora_ga":
        gram = B.T @ B
        return bool((gram - gram.diag().diag()).norm() <= _ROUNDING * gram.norm())
    W = base.weight.detach().float()
    W = W.T if isinstance(base, Conv1D) else W
    rest = B.T @ W - (1.0 - scale) * A if init.lower() == "olora" else B.T @ W
    return bool(rest.norm() <= _ROUNDING * B.norm() * (W.norm() + scale * B.norm() * A.norm()))


def taken(layer: LoraLayer, name: str) -> Taken | None:
    """What the initialisation of an adapter took out of its base layer, as noted; None: nothing, or nobody noted it."""
    return getattr(layer.lora_A[name], _TAKEN, None)


def all_taken(layer: nn.Module) -> list[Taken]:
    """What the initialisations of all adapters on a layer took out of its base layer."""
    found = [taken(layer, name) for name in layer.lora_A] if isinstance(layer, LoraLayer) else []
    return [had for had in found if had is not None]


def give_back(model: nn.Module, path: str, layer: LoraLayer, name: str) -> None:
    """Put the base weight under one adapter back to what it was before the initialisation, to rounding.

    Raises:
        AdapterError: the initialisation moved it, and nobody noted by how much.
    """
    had = taken(layer, name)
    if had is not None:
        base = base_layer(layer)
        with torch.no_grad():
            base.weight.add_(had.product(base))
        delattr(layer.lora_A[name], _TAKEN)
    elif (init := moved_by(model, name)) is not None:
        raise AdapterError(
            f"init_lora_weights={init!r} moved a part of {path} into its adapter, and that part was not recorded"
            " before training; remove adapters with weightlora.fit or attach"
        )


def start_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What :func:`note_start` noted of adapters, to be stored with a checkpoint."""
    state: dict[str, Tensor] = {}
    for path, layer in lora_layers(model, name):
        had = taken(layer, name)
        if had is not None:
            state |= {f"{path}.A": had.A, f"{path}.B": had.B, f"{path}.scale": torch.tensor(had.scale).double()}
    return state


def load_start_state(model: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """Put :func:`start_state` back: where this model's initialisation drew other values, its base is moved as then."""
    for path, layer in lora_layers(model, name):
        had = taken(layer, name)
        if had is None or f"{path}.A" not in state:
            continue
        A, B = (state[f"{path}.{factor}"].to(had.A) for factor in ("A", "B"))
        then = Taken(A, B, float(state[f"{path}.scale"]))
        if not (torch.equal(then.A, had.A) and torch.equal(then.B, had.B) and then.scale == had.scale):
            base = base_layer(layer)
            with torch.no_grad():
                base.weight.add_(had.product(base)).sub_(then.product(base))
            setattr(layer.lora_A[name], _TAKEN, then)


def changed_buffers(model: nn.Module) -> list[str]:
    """Buffers of the base that are not as they were when :func:`note_start` looked, by their names in a plain base.

    Empty where nobody looked. Those of adapters and saved modules travel with them and are left out.
    """
    before: dict[str, str] = model.__dict__.get(_BUFFERS, {})
    return [name for name, now in _hashes(model) if name in before and before[name] != now] if before else []


def noted(model: nn.Module) -> bool:
    """Whether :func:`note_start` looked at the model before it was trained."""
    return _BUFFERS in model.__dict__


def stock_name(name: str) -> str:
    """The name in the plain base of a parameter or buffer under PEFT's wrappers.

    >>> stock_name("a.q_proj.base_layer.bias"), stock_name("embed.token_adapter.base_layer.weight")
    ('a.q_proj.bias', 'embed.weight')
    >>> stock_name("mlp.experts.base_layer.base_layer.down_proj")
    'mlp.experts.down_proj'
    """
    return re.sub(r"(\.base_layer)+\.", ".", name.replace(".token_adapter.", "."))


def _hashes(model: nn.Module) -> Iterator[tuple[str, str]]:
    """``(name, hash)`` of every buffer that is saved, but for those of linear layers: there they are the weight."""
    inside: set[nn.Module] = set()
    for path, module in base_of(model).named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            inside |= set(module.modules())
        if module in inside or linear_shape(module) is not None:
            continue
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or buffer.is_meta:
                continue
            digest = hashlib.blake2b()
            for part in stored(buffer.detach()):
                digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            yield stock_name(f"{path}.{name}" if path else name), digest.hexdigest()
