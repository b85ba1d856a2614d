"""Ordered handles on the LoRA adapters of any PEFT model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, distributed, nn
from transformers.pytorch_utils import Conv1D

from weightlora.errors import AdapterError

if TYPE_CHECKING:

    class AdapterLayer(nn.Module, LoraLayer):
        """What every LoRA layer is: PEFT's ``LoraLayer`` is mixed into modules, and is none itself."""

        fan_in_fan_out: bool

        def get_delta_weight(self, adapter: str, /) -> Tensor: ...


_BLOCK = re.compile(r"(?:^|\.)(?:layer|layers|h|block|blocks|encoder|decoder)\.(\d+)(?:\.|$)")
_ADAPTER = re.compile(r"(?:^|\.)(?:lora_|vera_|vblora_|form_)")  # how a parameter of an adapter begins: PEFT's, ours


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One LoRA pair on one linear layer, as data.

    ``name`` is the module's full name in the base model (what a ``LoraConfig`` targets), ``block`` the transformer
    block it lies in (None outside blocks), ``kind`` the last part of the name, ``scale`` the factor s in ``dW = s *
    omega * B A``, ``tied`` the index of an earlier adapter with the very same A and B (None: its own). ``experts``: how
    many matrices of this shape a bare parameter holds, each with a pair of its own (None: a linear layer); the name is
    then the parameter's.
    """

    index: int
    name: str
    block: int | None
    kind: str
    d_in: int
    d_out: int
    rank: int
    scale: float
    tied: int | None = None
    experts: int | None = None

    @property
    def rows(self) -> int:
        """How many rows A has: the rank, times the experts."""
        return self.rank * (self.experts or 1)

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_in, d_out)``."""
        return self.d_in, self.d_out

    @property
    def role(self) -> str:
        """Where it lies in its block, whichever block that is: the rest of the name, without numbers.

        >>> rest = {"index": 0, "kind": "up", "d_in": 1, "d_out": 1, "rank": 1, "scale": 1.0}
        >>> Adapter(name="layer.3.mlp.experts.1.up", block=3, **rest).role
        'mlp.experts.up'
        """
        inner = self.name.removeprefix(block_path(self.name) or "")
        return ".".join(part for part in inner.split(".") if part and not part.isdigit())


def base_of(model: nn.Module) -> nn.Module:
    """The module in which adapter names are counted: the base model inside a PeftModel, or the model itself."""
    inner = getattr(getattr(model, "base_model", None), "model", None)
    return inner if isinstance(inner, nn.Module) and hasattr(model, "peft_config") else model


def trained_module(model: nn.Module, path: str) -> nn.Module:
    """The module that computes under a name of the base model: where PEFT trains a copy of it, the active copy."""
    module = base_of(model)
    for part in path.split("."):
        module = module.get_submodule(part)
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[module.active_adapters[0]]
    return module


def is_adapter(parameter: str) -> bool:
    """Whether a parameter, by its name, belongs to an adapter of ours or PEFT's: factors, vectors, gates of ranks.

    >>> is_adapter("layer.0.query.lora_A.default.weight"), is_adapter("form_rank_gates"), is_adapter("head.weight")
    (True, True, False)
    """
    return _ADAPTER.search(parameter) is not None


def train_heads(model: nn.Module, heads: Sequence[str] | None = None) -> None:
    """Freeze everything but some modules, by their names; None: those beside a Transformers model's ``base_model``.

    Raises:
        AdapterError: there are none: nothing would train.
    """
    if heads is None:
        body = getattr(model, "base_model", model)
        heads = [name for name, module in model.named_children() if body is not model and module is not body]
    if not heads:
        raise AdapterError(
            f"{type(model).__name__} has no new head to train: its head was pretrained; use a method with adapters"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(f"{head}.") for head in heads))


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT adapters of any kind are on the model."""
    return bool(getattr(model, "peft_config", None))


def adapter_name(model: nn.Module, name: str | None = None) -> str:
    """The adapter to work on: the given one, or the single active one.

    Raises:
        AdapterError: nothing is injected, several adapters are active, or the name is unknown.
    """
    config = getattr(model, "peft_config", None)
    if not config:
        raise AdapterError(
            f"{type(model).__name__} has no LoRA adapters; wrap it first: peft.get_peft_model(model, LoraConfig(...))"
        )
    if name is not None:
        if name not in config:
            raise AdapterError(f"adapter {name!r} is unknown; the model has {', '.join(map(repr, config))}")
        return name
    active = getattr(model, "active_adapters", None)
    active = list(active() if callable(active) else active or config)
    if len(active) != 1:
        raise AdapterError(f"the adapters {active} are active; activate exactly one with model.set_adapter(name)")
    return str(active[0])


def lora_layers(model: nn.Module, name: str) -> Iterator[tuple[str, AdapterLayer]]:
    """Every LoRA layer that holds adapter `name`, in module order, with its full name in the base model.

    PEFT nests the wrappers of one module's parameters, the first parameter inside; they come in the parameters' order.
    """
    return cast("Iterator[tuple[str, AdapterLayer]]", _lora_layers(model, name))  # a module with LoraLayer mixed in


def _lora_layers(model: nn.Module, name: str) -> Iterator[tuple[str, LoraLayer]]:
    for path, module in base_of(model).named_modules():
        if isinstance(module, ParamWrapper):
            if not path.endswith(".base_layer"):
                yield from ((f"{path}.{w.parameter_name}", w) for w in reversed(wrappers(module)) if name in w.lora_A)
        elif isinstance(module, LoraLayer) and name in module.lora_A:
            yield path, module


def wrappers(outermost: nn.Module) -> list[ParamWrapper]:
    """PEFT's wrappers of the bare parameters of one module, from the outermost inwards."""
    found: list[ParamWrapper] = []
    while isinstance(outermost, ParamWrapper):
        found.append(outermost)
        outermost = outermost.base_layer
    return found


def bare_parameter(layer: LoraLayer) -> Tensor:
    """The parameter that a wrapper adapts; it has no layer of its own."""
    found: Tensor = layer.get_param()  # type: ignore[attr-defined]  # it is a ParamWrapper
    return found


def experts_of(layer: LoraLayer) -> int | None:
    """How many matrices a bare parameter under an adapter holds; None of a layer."""
    return int(layer.num_experts) if isinstance(layer, ParamWrapper) else None


def rank_of(layer: LoraLayer, name: str) -> int:
    """r of an adapter; of experts each one's, of which A stacks the rows."""
    return factors(layer, name)[0].shape[0] // (experts_of(layer) or 1)


def block_of(path: str) -> int | None:
    """The index of the transformer block in a module path.

    >>> block_of("bert.encoder.layer.3.attention.self.query"), block_of("classifier")
    (3, None)
    """
    found = _BLOCK.search(path)
    return int(found.group(1)) if found else None


def block_path(path: str) -> str | None:
    """The path of the transformer block that a module lies in; None outside blocks.

    >>> block_path("bert.encoder.layer.3.attention.self.query"), block_path("classifier")
    ('bert.encoder.layer.3', None)
    """
    found = _BLOCK.search(path)
    return None if found is None else path[: found.end(1)]


def block_numbers(live: Sequence[Adapter]) -> list[int | None]:
    """The block of each adapter, counted over the whole model; None outside blocks.

    An encoder's block 0 is not a decoder's: blocks are one where their paths are, not where their numbers are.

    >>> paths = ("encoder.layers.0.fc1", "encoder.layers.0.fc2", "decoder.layers.0.fc1", "head")
    >>> rest = {"kind": "", "d_in": 1, "d_out": 1, "rank": 1, "scale": 1.0}
    >>> block_numbers([Adapter(index=i, name=p, block=block_of(p), **rest) for i, p in enumerate(paths)])
    [0, 0, 1, None]
    """
    seen: dict[str, int] = {}
    found = [block_path(adapter.name) for adapter in live]
    return [None if path is None else seen.setdefault(path, len(seen)) for path in found]


def adapters(model: nn.Module, name: str | None = None) -> tuple[Adapter, ...]:
    """The adapters of a PEFT LoRA model in module order (never parameter, set or dict order).

    Args:
        model: a ``PeftModel``, or a Transformers model with an injected adapter.
        name: PEFT's adapter name; default: the active one.

    Raises:
        AdapterError: the model has none, or one that cannot be selected (DoRA, embedding or convolution adapters, a
            base layer under two names, a quantised layer in which PEFT computes adapters its own way, a factor that one
            adapter shares with another's other half).

    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    >>> [a.name for a in adapters(get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1"])))]
    ['0', '1']
    """
    name = adapter_name(model, name)
    seen: dict[tuple[int, int], int] = {}
    owners: dict[int, tuple[int, int]] = {}
    found: list[Adapter] = []
    _check_embeddings(model, name)
    _check_shared(model, name)
    for path, layer in lora_layers(model, name):
        A, B = factors(layer, name)
        _check_supported(path, layer, name)
        pair = id(A), id(B)
        for factor in pair:
            if owners.setdefault(factor, pair) != pair:
                raise AdapterError(f"{path} shares only one factor with another adapter; tie both or none")
        tied = seen.setdefault(pair, len(found))
        found.append(
            Adapter(
                index=len(found),
                name=path,
                block=block_of(path),
                kind=path.rsplit(".", 1)[-1],
                d_in=A.shape[1],
                d_out=B.shape[0],
                rank=rank_of(layer, name),
                scale=float(layer.scaling[name]),
                tied=None if tied == len(found) else tied,
                experts=experts_of(layer),
            )
        )
    if not found:
        raise AdapterError(f"adapter {name!r} is on no linear layer; check target_modules of its LoraConfig")
    return tuple(found)


def is_sharded(held: nn.Module | Tensor) -> bool:
    """Whether a tensor, or any parameter of a model, lies in parts on several processes.

    >>> is_sharded(nn.Linear(2, 2))
    False
    """
    if not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(t, DTensor) for t in (held.parameters() if isinstance(held, nn.Module) else (held,)))


def refuse_tied(live: Sequence[Adapter]) -> None:
    """Raise AdapterError where adapters share factors: what is done to one of them would be done to all."""
    for adapter in live:
        if adapter.tied is not None:
            raise AdapterError(f"{adapter.name} shares its factors with {live[adapter.tied].name}; untie them first")


def _check_supported(path: str, layer: LoraLayer, name: str) -> None:
    if isinstance(layer, ParamWrapper):
        if not bare_parameter(layer).is_floating_point():
            raise AdapterError(f"{path} is quantised, and PEFT adapts bare parameters of floating point numbers only")
        return
    # A variant of our own (a gate left from before) is fine; DoRA and friends compute something else.
    variant = layer.lora_variant.get(name)
    if variant is not None and not getattr(variant, "is_gate", False):
        raise AdapterError(
            f"{path} uses the LoRA variant {type(variant).__name__}, which cannot be gated; use plain LoRA"
        )
    if layer.lora_bias.get(name):
        raise AdapterError(f"{path} has lora_bias=True, which cannot be gated; set lora_bias=False")
    base = layer.get_base_layer()
    if linear_shape(base) is None:
        raise AdapterError(f"{path} is a {type(base).__name__}; only linear layers can be gated, target those")
    if not honours_variants(layer):
        raise AdapterError(
            f"{path} is a {type(base).__name__} under PEFT's {type(layer).__name__}, which computes adapters its own"
            " way, so they cannot be gated; use an unquantised base, or one by bitsandbytes, GPTQ, HQQ or torchao"
        )


def _check_embeddings(model: nn.Module, name: str) -> None:
    for path, module in base_of(model).named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_embedding_A:
            raise AdapterError(f"{path} is an embedding with LoRA; only linear layers can be gated, target those")


def _check_shared(model: nn.Module, name: str) -> None:
    """An adapter on a layer with two names would be on under one of them, merged under both, or the like."""
    homes = {
        id(layer.get_base_layer()): path if experts_of(layer) is None else path.rpartition(".")[0]
        for path, layer in lora_layers(model, name)
    }
    for path, module in base_of(model).named_modules(remove_duplicate=False):
        home = homes.get(id(module))
        if home is not None and not path.startswith(f"{home}."):
            raise AdapterError(
                f"{home} and {path.removesuffix('.base_layer')} are the same layer under two names, which cannot have"
                " an adapter each; leave both out of target_modules"
            )


def linear_shape(base: nn.Module) -> tuple[int, int] | None:
    """``(d_in, d_out)`` of a linear layer, quantised or not, or of GPT-2's ``Conv1D``; None of anything else."""
    known = ("nx", "nf") if isinstance(base, Conv1D) else ("in_features", "out_features")
    d_in, d_out = (base.__dict__.get(key) for key in known)
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None


def honours_variants(layer: LoraLayer) -> bool:
    """Whether a layer kind's forward asks for variants (AWQ, AQLM, EETQ, bare parameters, ... do not)."""
    # A layer kind says so by a method of its own, or, in later releases of PEFT, by a property.
    ways = ("resolve_lora_variant", "lora_variants")
    return isinstance(layer, Linear) or any(
        getattr(type(layer), way, None) is not getattr(LoraLayer, way, None) for way in ways
    )


@contextlib.contextmanager
def switched_off(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, the layers of adapter `name` compute their base alone; nothing else changes, heads included."""
    layers = [layer for _, layer in lora_layers(model, name)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


def factors(layer: LoraLayer, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """The live parameters ``A (r, d_in)`` and ``B (d_out, r)`` of one layer."""
    return layer.lora_A[name].weight, layer.lora_B[name].weight  # type: ignore[return-value]


def base_layer(layer: LoraLayer) -> nn.Linear | Conv1D:
    """The linear layer under an adapter."""
    return cast("nn.Linear | Conv1D", layer.get_base_layer())


def layer_weights(model: nn.Module, name: str) -> tuple[Tensor, ...]:
    """The frozen weight ``(d_out, d_in)`` under every adapter, in module order; to be read, not written.

    Empty where a quantised layer keeps no tensor of that name (GPTQModel's has something else there).
    """
    bases = [layer.get_base_layer() for _, layer in lora_layers(model, name)]
    found = [getattr(base, "weight", None) for base in bases]
    weights = [weight.detach() if isinstance(weight, Tensor) else torch.empty(0) for weight in found]
    return tuple(weight.T if isinstance(base, Conv1D) else weight for base, weight in zip(bases, weights, strict=True))


def parameters(
    model: nn.Module, name: str, names: Sequence[str] | None = None
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """``{module name: (A, B)}`` of the adapters in `names` (default: all), in module order."""
    wanted = None if names is None else set(names)
    return {path: factors(layer, name) for path, layer in lora_layers(model, name) if wanted is None or path in wanted}
