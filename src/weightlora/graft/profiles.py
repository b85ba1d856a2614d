"""What each export profile writes: the live model read into tensors, and those put into a profile's form."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weightlora.errors import ExportError
from weightlora.files import write_text
from weightlora.graft.adapters import adapter_name, adapters, base_of, linear_shape, lora_layers
from weightlora.graft.variant import computing_factors
from weightlora.graft.verify import HEAD, PREFIX, WEIGHTS, device_of, plain_base

# Linear layers of one parent that servers fuse into one, so that they want adapters on all of them or on none.
FUSED = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"query", "key", "value"}),
    frozenset({"query_proj", "key_proj", "value_proj"}),
    frozenset({"gate_proj", "up_proj"}),
)
HEAD_NAMES = "head.json"
# What vLLM's --max-lora-rank may be.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Tasks for which PEFT, on loading, wants a head in the file.
_TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
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


def read(model: nn.Module, name: str | None, *, whole: bool, stock: bool) -> Live:
    """Read the adapters, with their gates or form folded in, and the heads; nothing is changed.

    Args:
        model: with adapters, or (where `whole`) without.
        name: PEFT's adapter name, None for the active one.
        whole: the base's weights will be saved too, so that no adapter need be left.
        stock: the adapter must do on a stock base, so that nothing else may have been trained.

    Raises:
        AdapterError: there are none, or not plain LoRA.
        ExportError: the state or the settings of the model have no place in the profile.
    """
    root = base_of(model)
    if whole and not getattr(model, "peft_config", None):
        return Live(root=root, config=None, pairs={}, heads={})
    name = adapter_name(model, name)
    config: LoraConfig = getattr(model, "peft_config")[name]  # noqa: B009
    found = {adapter.name: adapter.scale for adapter in adapters(model, name)}
    _check_state(model, name)
    if stock:
        _check_settings(config)
        _check_trained(root)
    heads = {
        path: module.modules_to_save[name]
        for path, module in root.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save
    }
    pairs: dict[str, Pair] = {}
    zeros = 0
    for path, layer in lora_layers(model, name):
        A, B, gate = computing_factors(layer, name)
        A, B, omega = A.detach().cpu(), B.detach().cpu(), 1.0 if gate is None else float(gate.detach())
        if omega == 0.0:
            zeros += 1
        else:
            pairs[path] = Pair(A.clone(), (B * omega).to(B), found[path])
    if not pairs and not whole:
        raise ExportError("every gate is zero, so no adapter is left to export; select with k of 1 or more")
    notes = (f"{zeros} of {zeros + len(pairs)} adapters have a gate of zero and were left out",) if zeros else ()
    return Live(root=root, config=config, pairs=pairs, heads=heads, notes=notes)


def _check_state(model: nn.Module, name: str) -> None:
    """The live logits must be those of this adapter alone, on an untouched base."""
    active = getattr(model, "active_adapters", None)
    active = list(active() if callable(active) else active or [name])
    if active != [name]:
        raise ExportError(f"adapter {name!r} is not active ({active} is); call model.set_adapter({name!r}) first")
    for path, module in base_of(model).named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            raise ExportError(f"{path} trains single tokens, which no profile carries; use modules_to_save instead")
        if isinstance(module, LoraLayer) and module.merged:
            raise ExportError(f"the adapter on {path} is merged into its base; call model.unmerge_adapter() first")
        if isinstance(module, LoraLayer) and module.disable_adapters:
            raise ExportError("the adapters are disabled; call model.base_model.enable_adapter_layers() first")
        if isinstance(module, LoraLayer) and name in module.lora_embedding_A:
            raise ExportError(f"{path} is an embedding with LoRA; only linear layers can be exported, target those")


def _check_settings(config: LoraConfig) -> None:
    if config.bias != "none":
        raise ExportError(f"bias={config.bias!r} trains biases of the base, which do not travel; use profile 'merged'")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in _HARMLESS_INIT:
        raise ExportError(
            f"init_lora_weights={init!r} moved a part of the base into the adapter, which no longer fits a stock base;"
            " use profile 'merged'"
        )
    if config.layer_replication:
        raise ExportError("layer_replication changes the layers of the base, which do not travel; use profile 'merged'")


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
            f"{len(left)} trained parameters of the base ({left[0]}, ...) are no part of an adapter; name their modules"
            " in modules_to_save before training, or use profile 'merged'"
        )


def complete(root: nn.Module, pairs: Mapping[str, Pair], *, everywhere: bool) -> list[str]:
    """Names of linear layers that need a zero adapter, in module order.

    Those that servers fuse with a live one; `everywhere`: and those at the same places of other blocks, where a place
    is the name without the numbers in it (``model.layers.*.self_attn.q_proj``).
    """
    linear = [name for name, module in root.named_modules() if _linear_shape(module) is not None]
    wanted = set(pairs)
    for path in pairs:
        parent, dot, kind = path.rpartition(".")
        for group in FUSED:
            if kind in group:
                wanted |= {parent + dot + sibling for sibling in group}
    if everywhere:
        places = {_place(path) for path in wanted}
        wanted |= {path for path in linear if _place(path) in places}
    return [path for path in linear if path in wanted and path not in pairs]


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(d_in, d_out)`` of a linear layer, with or without an adapter on it, quantised or not."""
    return linear_shape(module.get_base_layer() if isinstance(module, LoraLayer) else module)


def _place(path: str) -> tuple[str, ...]:
    return tuple("*" if part.isdigit() else part for part in path.split("."))


def write_adapter(live: Live, folder: Path, profile: str) -> tuple[int, tuple[str, ...]]:
    """Write an adapter in the form of `profile`; returns the highest rank and the notes."""
    if profile == "native":
        config, tensors, notes = _native(live)
    else:
        config, tensors, notes = _portable(live, everywhere=profile == "dense")
        if live.heads:
            notes = (*_write_head(live, folder), *notes)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return max(pair.rank for pair in live.pairs.values()), (*live.notes, *notes)


def _native(live: Live) -> tuple[LoraConfig, dict[str, Tensor], tuple[str, ...]]:
    forms = [(pair.rank, pair.alpha) for pair in live.pairs.values()]
    rank, alpha = max(forms, key=forms.count)
    config = _config(live, list(live.pairs), rank, alpha)
    config.rank_pattern = {path: pair.rank for path, pair in live.pairs.items() if pair.rank != rank}
    config.alpha_pattern = {
        path: pair.alpha for path, pair in live.pairs.items() if not math.isclose(pair.alpha, alpha, rel_tol=1e-9)
    }
    config.modules_to_save = list(live.heads) or None
    tensors = _tensors(live.pairs)
    for path, head in live.heads.items():
        tensors |= {f"{PREFIX}{path}.{key}": value for key, value in _state(head).items()}
    reasons = []
    if config.rank_pattern or config.alpha_pattern:
        reasons.append("ranks or scales differ, which vLLM ignores and SGLang refuses")
    if live.heads:
        reasons.append("a trained head is inside, which vLLM refuses")
    note = f"for PEFT only ({'; '.join(reasons)}): use profile 'portable' or 'merged' for servers"
    return config, tensors, (note,) if reasons else ()


def _portable(live: Live, *, everywhere: bool) -> tuple[LoraConfig, dict[str, Tensor], tuple[str, ...]]:
    rank = max(pair.rank for pair in live.pairs.values())
    zeros = complete(live.root, live.pairs, everywhere=everywhere)
    like = next(iter(live.pairs.values())).A
    pairs = {path: pair.padded(rank) for path, pair in live.pairs.items()}
    for path in zeros:
        d_in, d_out = _linear_shape(live.root.get_submodule(path)) or (0, 0)
        pairs[path] = Pair(like.new_zeros(rank, d_in), like.new_zeros(d_out, rank), 1.0)
    order = {path: place for place, (path, _) in enumerate(live.root.named_modules())}
    pairs = {path: pairs[path] for path in sorted(pairs, key=order.__getitem__)}
    fits = next((step for step in VLLM_RANKS if step >= rank), None)
    notes = [
        f"vLLM: rank {rank} is more than the {VLLM_RANKS[-1]} it accepts"
        if fits is None
        else f"vLLM: --max-lora-rank {fits}"
    ]
    padded = sum(pair.rank != rank for pair in live.pairs.values())
    if padded:
        notes.append(f"{padded} adapters were padded with zeros to rank {rank}")
    if zeros:
        where = "at the same places of all blocks" if everywhere else "to complete what servers fuse (q/k/v, gate/up)"
        notes.append(f"zero adapters were added on {len(zeros)} modules {where}")
    config = _config(live, list(pairs), rank, rank, headless=True)
    return config, _tensors(pairs), tuple(notes)


def _config(live: Live, targets: list[str], rank: int, alpha: float, *, headless: bool = False) -> LoraConfig:
    """A fresh config that says what loading needs; nothing that steered the training of this adapter is left in it."""
    old = live.config
    assert old is not None
    task = None if headless and old.task_type in _TASKS_WITH_HEAD else old.task_type
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float where the scale asks for one
        lora_dropout=old.lora_dropout,
        task_type=task,
        base_model_name_or_path=live.base_name,
        revision=old.revision,
        inference_mode=True,
        fan_in_fan_out=old.fan_in_fan_out,
    )
    # PEFT makes a set of what it is given; a list has an order, which makes the file the same every time.
    config.target_modules = targets
    if task is None:
        kind = type(live.root)
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return config


def _tensors(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    tensors = {}
    for path, pair in pairs.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = pair.A.contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = pair.B.contiguous()
    return tensors


def _state(module: nn.Module) -> dict[str, Tensor]:
    # Copies: safetensors refuses tensors that share memory.
    return {key: value.detach().cpu().clone().contiguous() for key, value in module.state_dict().items()}


def _write_head(live: Live, folder: Path) -> tuple[str, ...]:
    """The trained heads beside the adapter, under the base model's own names."""
    tensors = {f"{path}.{key}": value for path, head in live.heads.items() for key, value in _state(head).items()}
    save_file(tensors, folder / HEAD, metadata={"format": "pt"})
    names = {"file": HEAD, "modules": list(live.heads), "base_model_name_or_path": live.base_name}
    write_text(folder / HEAD_NAMES, json.dumps(names, indent=1) + "\n")
    return (
        f"the trained head cannot travel in this profile; it was saved to {HEAD} (modules {', '.join(live.heads)}):"
        " load it into the base model first, as README.md shows, or use profile 'merged'",
    )


def merge(live: Live, base: nn.Module | None) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A plain model with ``W + s omega B A`` in the place of W and the trained heads in theirs; it shares the rest.

    Raises:
        ExportError: the model to merge into is quantised, is no Transformers model, or has another structure.
    """
    plain = plain_base(live.root if base is None else base_of(base))
    if not isinstance(plain, PreTrainedModel):
        raise ExportError(f"{type(plain).__name__} is no Transformers model and cannot be saved as one; use 'native'")
    quantised = bool(getattr(plain, "is_quantized", False) or getattr(plain.config, "quantization_config", None))
    shared = _shared_parameters(plain)
    untied = False
    for path, pair in live.pairs.items():
        linear = _submodule(plain, path)
        weight: Any = getattr(linear, "weight", None)
        # A tensor of a class of its own, such as torchao's, may say that it is floating and yet round what it is given.
        own_kind = type(weight) not in (nn.Parameter, Tensor)
        if quantised or not isinstance(weight, Tensor) or own_kind or not weight.is_floating_point():
            raise ExportError(
                f"the base model is quantised ({type(linear).__name__} at {path}), and merging would round the adapter"
                " away; load the full-precision base and pass base=..."
            )
        if _linear_shape(linear) != (pair.A.shape[1], pair.B.shape[0]):
            raise ExportError(f"{path} has another shape in base= than under the adapter; pass the same model")
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = (pair.B.to(wide) @ pair.A.to(wide)) * pair.scale
        delta = delta.T if isinstance(linear, Conv1D) else delta
        untied |= id(weight) in shared
        linear.weight = nn.Parameter((weight.to(wide) + delta.to(weight.device)).to(weight.dtype), requires_grad=False)
    for path, head in live.heads.items():
        untied |= any(id(p) in shared for p in _submodule(plain, path).parameters())
        parent, _, child = path.rpartition(".")
        setattr(plain.get_submodule(parent), child, copy.deepcopy(head).to(device_of(plain)))
    if not untied:
        return plain, live.notes
    plain.config.tie_word_embeddings = plain.config.get_text_config().tie_word_embeddings = False
    return plain, (*live.notes, "input and output embeddings were tied; they differ now and are saved apart")


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ExportError(
            f"base= has no module {path!r}, where the model has an adapter or a head; pass the same model, unquantised"
        ) from None


def _shared_parameters(model: nn.Module) -> set[int]:
    seen = [id(p) for module in model.modules() for p in module._parameters.values() if p is not None]
    return {key for key, times in Counter(seen).items() if times > 1}
