"""What each export profile writes: the live model read into tensors, and those put into a profile's form."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from weightlora.errors import ExportError
from weightlora.files import write_text
from weightlora.graft.adapters import adapter_name, adapters, base_of, factors, lora_layers
from weightlora.graft.verify import HEAD, PREFIX, WEIGHTS, isolated, plain_base

# Linear layers of one parent that servers fuse into one, so that they want adapters on all of them or on none.
FUSED = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"query", "key", "value"}),
    frozenset({"query_proj", "key_proj", "value_proj"}),
    frozenset({"gate_proj", "up_proj"}),
)
# What vLLM's --max-lora-rank may be.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Initial values that leave the base model's weights alone; PEFT's others move a part of them into the adapter.
_HARMLESS_INIT = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Pair:
    """One adapter to write: ``A (r, d_in)`` and ``omega B (d_out, r)`` on the CPU, and s."""

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return int(self.A.shape[0])

    @property
    def alpha(self) -> float:
        """PEFT's alpha, s r: a whole number where it is one but for rounding, as people wrote it."""
        value = self.scale * self.rank
        return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value

    def padded(self, rank: int) -> Pair:
        """The same product with this rank, and the scale folded into B."""
        A, B = self.A.new_zeros(rank, self.A.shape[1]), self.B.new_zeros(self.B.shape[0], rank)
        A[: self.rank] = self.A
        B[:, : self.rank] = (self.B.double() * self.scale).to(self.B)
        return Pair(A, B, 1.0)


@dataclass(frozen=True, kw_only=True)
class Live:
    """The live model, read: its base, PEFT's config, its non-zero adapters in module order, its trained heads."""

    root: nn.Module
    config: LoraConfig | None
    pairs: dict[str, Pair]
    heads: dict[str, nn.Module]
    notes: tuple[str, ...] = ()

    @property
    def base_name(self) -> str | None:
        """The base model's hub name or folder, if anybody knows it."""
        name = getattr(self.config, "base_model_name_or_path", None) or self.root.__dict__.get("name_or_path")
        return str(name) if name else None


def read(model: nn.Module, name: str | None, profile: str) -> Live:
    """Read the adapters, with their gates folded in, and the heads; nothing is changed.

    Raises:
        AdapterError: there are none, or not plain LoRA.
        ExportError: the state or the settings of the model have no place in the profile.
    """
    root = base_of(model)
    if profile == "merged" and not getattr(model, "peft_config", None):
        return Live(root=root, config=None, pairs={}, heads={})
    name = adapter_name(model, name)
    config = model.peft_config[name]
    found = {adapter.name: adapter.scale for adapter in adapters(model, name)}
    _check_state(model, name)
    if profile != "merged":
        _check_settings(config)
        _check_trained(root)
    heads = {}
    for path, module in root.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            heads[path] = module.modules_to_save[name]
        elif isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            raise ExportError(f"{path} trains single tokens, which no profile carries; train it through modules_to_save")
    pairs, zeros = {}, 0
    for path, layer in lora_layers(model, name):
        A, B = (factor.detach().cpu() for factor in factors(layer, name))
        gate = layer.lora_variant.get(name)
        omega = 1.0 if gate is None else gate.gates.omega[gate.index].detach().cpu()
        if omega == 0.0:
            zeros += 1
        else:
            pairs[path] = Pair(A.clone(), (B * omega).to(B), found[path])
    if not pairs and profile != "merged":
        raise ExportError("every gate is zero, so no adapter is left to export; select with k of 1 or more")
    notes = (f"{zeros} of {zeros + len(pairs)} adapters have a gate of zero and were left out",) if zeros else ()
    return Live(root=root, config=config, pairs=pairs, heads=heads, notes=notes)


def _check_state(model: nn.Module, name: str) -> None:
    """The live logits must be those of this adapter alone, on an untouched base."""
    active = getattr(model, "active_adapters", None)
    active = list(active() if callable(active) else active or [name])
    if active != [name]:
        raise ExportError(f"adapter {name!r} is not the active one ({active} is); call model.set_adapter({name!r}) first")
    for path, module in base_of(model).named_modules():
        if isinstance(module, LoraLayer) and module.merged:
            raise ExportError(f"the adapter on {path} is merged into its base; call model.unmerge_adapter() first")
        if isinstance(module, LoraLayer) and module.disable_adapters:
            raise ExportError("the adapters are disabled; call model.base_model.enable_adapter_layers() first")
        if isinstance(module, LoraLayer) and name in module.lora_embedding_A:
            raise ExportError(f"{path} is an embedding with LoRA; only linear layers can be exported, target those")


def _check_settings(config: LoraConfig) -> None:
    if config.bias != "none":
        raise ExportError(f"bias={config.bias!r} trains the base's own biases, which servers refuse; use profile 'merged'")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in _HARMLESS_INIT:
        raise ExportError(
            f"init_lora_weights={init!r} moved a part of the base into the adapter, which does not fit the stock base any more;"
            " use profile 'merged'"
        )
    if config.layer_replication:
        raise ExportError("layer_replication changes the base's layers, which servers refuse; use profile 'merged'")


def _check_trained(root: nn.Module) -> None:
    """Every trained parameter must be one that travels."""
    carried: set[int] = set()
    for module in root.modules():
        if isinstance(module, LoraLayer):
            carried |= {id(p) for p in module.parameters()} - {id(p) for p in module.get_base_layer().parameters()}
        elif isinstance(module, ModulesToSaveWrapper):
            carried |= {id(p) for p in module.modules_to_save.parameters()}
    left = [name for name, p in root.named_parameters() if p.requires_grad and id(p) not in carried]
    if left:
        raise ExportError(
            f"{len(left)} trained parameters of the base ({left[0]}, ...) are no part of an adapter; name their modules in"
            " modules_to_save before training, or use profile 'merged'"
        )


def complete(root: nn.Module, pairs: dict[str, Pair], *, everywhere: bool) -> list[str]:
    """Names of linear layers that need a zero adapter, in module order.

    Those that servers fuse with a live one; `everywhere`: and those at the same places of other blocks, where a place is the
    name without the numbers in it (``model.layers.*.self_attn.q_proj``).
    """
    linear = [name for name, module in root.named_modules() if _is_linear(module) and not _inside_layer(name, pairs)]
    known = set(linear)
    wanted = set(pairs)
    for path in pairs:
        parent, dot, kind = path.rpartition(".")
        for group in FUSED:
            if kind in group:
                wanted |= {parent + dot + sibling for sibling in group} & known
    if everywhere:
        places = {_place(path) for path in wanted}
        wanted |= {path for path in linear if _place(path) in places}
    return [path for path in linear if path in wanted and path not in pairs]


def _is_linear(module: nn.Module) -> bool:
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return isinstance(base, nn.Linear)


def _inside_layer(name: str, pairs: dict[str, Pair]) -> bool:
    return ".base_layer" in name or ".lora_" in name


def _place(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{path}")


def write_adapter(live: Live, folder: Path, profile: str) -> tuple[int, tuple[str, ...]]:
    """Write ``adapter_config.json`` and tensors in the form of `profile`; returns the highest rank and the notes."""
    rank = max(pair.rank for pair in live.pairs.values())
    if profile == "native":
        tensors = _tensors(live.pairs)
        for path, head in live.heads.items():
            tensors |= {f"{PREFIX}{path}.{key}": value for key, value in head.state_dict().items()}
        config = native_config(live)
        patterns = bool(config.rank_pattern or config.alpha_pattern)
        notes = (("ranks or scales differ: vLLM ignores that and SGLang refuses it, use profile 'portable' for servers",)
                 if patterns else ())
        if live.heads and not patterns:
            notes = ("vLLM refuses modules_to_save, use profile 'portable' or 'merged' for servers",)
    else:
        zeros = complete(live.root, live.pairs, everywhere=profile == "dense")
    return rank, notes
