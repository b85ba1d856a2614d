"""What of a trained model is not in its adapters, and which export profile can hold it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import PreTrainedModel

from weightlora.errors import AdapterError, ExportError
from weightlora.graft.adapters import base_of, experts_of, linear_shape, lora_layers
from weightlora.graft.start import changed_buffers, moved_by, noted, stock_name
from weightlora.graft.verify import TOLERANCE, isolated, plain_base

# What opening a folder that holds no such model raises.
_NOT_OPENED = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)


@dataclass(frozen=True, kw_only=True)
class Outside:
    """Weights, by their names in a plain base, that differ from a stock base and lie in no adapter or saved module.

    ``why``: in a few words, by name. ``rows``: what a stock base's embeddings must be resized to before loading.
    """

    tensors: Mapping[str, Tensor]
    why: Mapping[str, str]
    rows: int | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        first = [f"{name}: {self.why[name]}" for name in list(self.tensors)[:3]]
        return f"{', '.join(first)}{', ...' if len(self.tensors) > 3 else ''}"


def base_name(root: nn.Module, config: object) -> str | None:
    """The base model's hub name or folder, if anybody knows it."""
    name = getattr(config, "base_model_name_or_path", None) or root.__dict__.get("name_or_path")
    return str(name) if name else None


def token_wrappers(root: nn.Module, name: str) -> dict[str, TrainableTokensWrapper]:
    """Embeddings (and heads tied to them) of which adapter `name` trains single rows, by path."""
    return {
        path: module
        for path, module in root.named_modules()
        if isinstance(module, TrainableTokensWrapper) and name in module.token_adapter.token_indices
    }


def trained_outside(root: nn.Module) -> list[str]:
    """Parameters that train and are no part of an adapter, a saved module or single tokens; names in a plain base."""
    carried: set[int] = set()
    for module in root.modules():
        if isinstance(module, LoraLayer):
            carried |= {id(p) for p in module.parameters()} - {id(p) for p in module.get_base_layer().parameters()}
        elif isinstance(module, ModulesToSaveWrapper):
            carried |= {id(p) for p in module.modules_to_save.parameters()}
        elif isinstance(module, TrainableTokensWrapper):
            carried |= {id(p) for p in module.token_adapter.trainable_tokens_delta.parameters()}
    return [stock_name(name) for name, p in root.named_parameters() if p.requires_grad and id(p) not in carried]


def running_statistics(root: nn.Module) -> list[str]:
    """Modules that update buffers whenever they train (BatchNorm), outside saved modules."""
    inside = {
        m for wrapper in root.modules() if isinstance(wrapper, AuxiliaryTrainingWrapper) for m in wrapper.modules()
    }
    return [
        stock_name(path)
        for path, module in root.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None and module not in inside
    ]


def tied_head(root: nn.Module, heads: Mapping[str, nn.Module], *, trained: bool = True) -> tuple[str, str] | None:
    """A saved module whose weight a stock base shares with another one, so that it cannot be loaded there alone.

    Two saved modules may be one parameter, or (`trained`) have come out equal.
    """
    if not heads:
        return None
    holders: dict[int, list[tuple[str, str]]] = {}
    for path, module in root.named_modules():
        if ".modules_to_save." in path:
            continue  # the trained copy of what the base has
        stock = stock_name(f"{path}.".replace(".original_module.", ".")).removesuffix(".")
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((stock, key))
    for shared in (places for places in holders.values() if len(places) > 1):
        saved = [(path, key) for path, key in shared if path in heads]
        values = [heads[path].get_parameter(key) for path, key in saved]
        alike = all(value is values[0] or (trained and torch.equal(value, values[0])) for value in values)
        if saved and not (alike and len(saved) == len(shared)):
            other = next((path for path, _ in shared if path != saved[0][0]), saved[0][0])
            return saved[0][0], other
    return None


def saved_modules(root: nn.Module, name: str) -> dict[str, nn.Module]:
    """Modules that PEFT trains and saves as a whole for adapter `name`, by path."""
    return {
        path: module.modules_to_save[name]
        for path, module in root.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save
    }


def check_before(model: nn.Module, name: str) -> list[str]:
    """What must be said before training about this model's checkpoints and exports; nothing in most cases.

    Raises:
        AdapterError: biases of layers whose adapters are removed would go on training.
    """
    root, holder = base_of(model), getattr(model, "peft_config")  # noqa: B009
    config = holder[name]
    if config.bias.endswith("_only"):
        raise AdapterError(
            f"bias={config.bias!r} trains the biases of adapted layers, and those of layers whose adapters are removed"
            " would go on training; use bias='none', or 'all'"
        )
    things, trained = [], trained_outside(root)
    if trained:
        things.append(f"{len(trained)} trained weights of the base ({', '.join(trained[:3])})")
    if statistics := running_statistics(root):
        things.append(f"running statistics ({', '.join(statistics[:3])})")
    if tokens := token_wrappers(root, name):
        things.append(f"single trained tokens ({', '.join(tokens)})")
    if tied := tied_head(root, saved_modules(root, name), trained=False):
        things.append(f"{tied[0]}, which is tied to {tied[1]} in the base")
    if rows := _resized(root, base_name(root, config)):
        things.append(f"embeddings of {rows[0]} rows, where the base's have {rows[1]}")
    lines = []
    bare = [path for path, layer in lora_layers(model, name) if experts_of(layer) is not None]
    if bare:
        things.append(f"{len(bare)} adapters on bare parameters ({', '.join(bare[:2])}, ...)")
    if things:
        lines.append(f"export profiles portable, dense and gguf cannot hold {'; '.join(things)}: use native or merged")
    if uncheckpointed(model, name):
        lines.append(
            f"no checkpoint of PEFT's holds {', '.join(uncheckpointed(model, name)[:3])}: this run cannot be resumed;"
            " name such modules in modules_to_save"
        )
    if (init := moved_by(model, name)) is not None:
        lines.append(
            f"init_lora_weights={init!r} moved the base: A and B as PEFT saves them do on that base alone;"
            " weightlora.export writes them for the stock base, with the ranks of both"
        )
    return lines


def uncheckpointed(model: nn.Module, name: str) -> list[str]:
    """What training changes and PEFT's checkpoints do not hold."""
    root, holder = base_of(model), getattr(model, "peft_config")  # noqa: B009
    trained = [key for key in trained_outside(root) if holder[name].bias != "all" or not key.endswith("bias")]
    return trained + running_statistics(root)


def _resized(root: nn.Module, name: str | None) -> tuple[int, int] | None:
    """Rows of the embeddings here and in the base, where those differ and the base's configuration is at hand."""
    if name is None or not isinstance(root, PreTrainedModel):
        return None
    try:
        stock = type(root.config).from_pretrained(name, local_files_only=True)
    except _NOT_OPENED:
        return None
    here, there = (getattr(config.get_text_config(), "vocab_size", None) for config in (root.config, stock))
    return (here, there) if here is not None and there is not None and here != there else None


def find_outside(model: nn.Module, root: nn.Module, name: str | None, carried: Sequence[str]) -> Outside:
    """Everything that would be missing where the adapter is put on a stock base.

    That base is opened from its folder, or from the cache, and every weight is compared. Where it cannot be opened,
    what trains now and the buffers that training changed are what can be known.

    Args:
        model: with adapters.
        root: the base inside it.
        name: the base's hub name or folder.
        carried: paths of modules that the export holds as a whole.

    Raises:
        ExportError: most of the base differs from what `name` holds.
    """
    plain = plain_base(root)
    state = plain.state_dict()
    why = dict.fromkeys(trained_outside(root), "trained") | dict.fromkeys(changed_buffers(model), "changed by training")
    stock, fresh = _open_stock(root, name)
    notes: tuple[str, ...] = ()
    rows = None
    if isinstance(stock, str):
        careful = "" if noted(model) else "; what else was changed in it would not be seen"
        notes = (f"compared on the base in memory, as {stock}{careful}",)
    else:
        packed = [path for path, module in plain.named_modules() if linear_shape(module) and not _is_plain(module)]
        for key, value in _differing({k: t for k, t in state.items() if not _inside(k, packed)}, stock):
            why.setdefault(key, "made at random where the base was loaded" if key in fresh else value)
        total = sum(t.numel() for t in state.values())
        if sum(state[key].numel() for key in why if key in state and not _inside(key, carried)) > total / 2:
            raise ExportError(
                f"most weights of the base differ from those of {name} ({next(iter(why))}, ...), so this adapter does"
                " not fit it; use profile 'merged', or correct base_model_name_or_path"
            )
        rows = _new_rows(root, state, stock)
    tensors = {key: value for key, value in state.items() if key in why and not _inside(key, carried)}
    return Outside(tensors=tensors, why=why, rows=rows, notes=notes)


def _is_plain(linear: nn.Module) -> bool:
    """Whether a linear layer has a weight of floating point numbers, which a stock base has too, not quantised ones."""
    weight = getattr(linear, "weight", None)
    return type(weight) in (nn.Parameter, Tensor) and bool(weight.is_floating_point())  # type: ignore[union-attr]


def _inside(key: str, paths: Sequence[str]) -> bool:
    return any(key.startswith(f"{path}.") for path in paths)


def _open_stock(root: nn.Module, name: str | None) -> tuple[dict[str, Tensor] | str, set[str]]:
    """The weights of the base as anybody would load it, without network, and the names of those that its files lack;
    or why it cannot be opened."""
    if name is None:
        return "it has no name to load it by", set()
    if not isinstance(root, PreTrainedModel) or getattr(root, "is_quantized", False):
        return f"{name} is loaded in a form that cannot be compared", set()
    try:
        with isolated(root):
            opened = type(root).from_pretrained(
                name,
                revision=getattr(root.config, "_commit_hash", None) or "main",
                local_files_only=True,
                output_loading_info=True,
            )
    except _NOT_OPENED:
        return f"{name} cannot be opened here without network", set()
    model, info = cast("tuple[PreTrainedModel, dict[str, list[str]]]", opened)
    return model.state_dict(), set(map(str, info["missing_keys"]))


def _differing(state: Mapping[str, Tensor], stock: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Weights that are not those of the stock base, to rounding, and what is different about them."""
    for key, value in state.items():
        other = stock.get(key)
        if other is None or other.shape != value.shape:
            yield key, "not in the base" if other is None else f"{list(value.shape)}, the base's {list(other.shape)}"
            continue
        here, there = value.detach().cpu(), other.detach().to(value.dtype)
        if torch.equal(here, there):
            continue
        # What an initialisation took and a removed adapter gave back is there again but for rounding.
        near = (
            TOLERANCE[torch.float32] * float(there.abs().max()) if here.dtype in (torch.float32, torch.float64) else 0.0
        )
        if not float((here.double() - there.double()).abs().max()) <= near:
            yield key, "not the base's"


def _new_rows(root: nn.Module, state: Mapping[str, Tensor], stock: Mapping[str, Tensor]) -> int | None:
    """Rows that the embeddings have here, if a stock base's have others."""
    assert isinstance(root, PreTrainedModel)
    try:
        embedding = root.get_input_embeddings()
    except NotImplementedError:
        return None  # it has none
    path = next((stock_name(path) for path, module in root.named_modules() if module is embedding), None)
    here, there = state.get(f"{path}.weight"), stock.get(f"{path}.weight")
    return None if here is None or there is None or len(here) == len(there) else len(here)


def file_name(key: str, adapted: Mapping[str, int], tokens: Sequence[str]) -> str:
    """The name that a weight of the plain base has under stock PEFT, which wraps the adapted modules.

    Args:
        key: its name in the plain base.
        adapted: how many wrappers are around each adapted module.
        tokens: embeddings of which single rows train.

    >>> file_name("a.q_proj.bias", {"a.q_proj": 1}, []), file_name("norm.weight", {"a.q_proj": 1}, [])
    ('a.q_proj.base_layer.bias', 'norm.weight')
    """
    path, _, leaf = key.rpartition(".")
    inner = "token_adapter.base_layer." if path in tokens else "base_layer." * adapted.get(path, 0)
    return f"{path}.{inner}{leaf}" if path else leaf
