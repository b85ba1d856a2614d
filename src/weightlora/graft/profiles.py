"""What each export profile writes: the live model read into tensors, and those put into a profile's form."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from weightlora.errors import ExportError
from weightlora.files import write_text
from weightlora.graft.adapters import adapter_name, adapters, base_of, experts_of, linear_shape, lora_layers
from weightlora.graft.carried import (
    Outside,
    base_name,
    file_name,
    find_outside,
    saved_modules,
    tied_head,
    token_wrappers,
)
from weightlora.graft.start import moved_by, taken
from weightlora.graft.variant import computing_factors
from weightlora.graft.verify import HEAD, PREFIX, WEIGHTS

if TYPE_CHECKING:
    from weightlora.graft.adapters import AdapterLayer

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


@dataclass(frozen=True)
class Pair:
    """One adapter to write: ``A (r, d_in)`` and ``omega B (d_out, r)`` on the CPU, and s.

    ``experts``: how many pairs A and B stack, for the matrices of a bare parameter; ``transposed``: those are
    ``(d_in, d_out)``.
    """

    A: Tensor
    B: Tensor
    scale: float
    experts: int | None = None
    transposed: bool = False

    @property
    def rank(self) -> int:
        """r."""
        return int(self.A.shape[0]) // (self.experts or 1)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """``s omega B A`` of a linear layer, ``(d_out, d_in)``; of a bare parameter in its own layout."""
        A, B = self.A.to(dtype), self.B.to(dtype)
        if self.experts in (None, 1):
            return B @ A * self.scale  # a single matrix has PEFT's layout of a linear layer
        A = A.reshape(self.experts, self.rank, -1)
        B = B.reshape(-1, self.rank, self.experts).permute(2, 0, 1)
        return (B @ A).transpose(1, 2) * self.scale if self.transposed else B @ A * self.scale

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
    """The live model, read: its base, PEFT's config, its non-zero adapters in module order, its trained heads.

    ``tokens``: embeddings of which single rows train. ``outside``: what else a stock base has not.
    """

    root: nn.Module
    config: LoraConfig | None
    pairs: dict[str, Pair]
    heads: dict[str, nn.Module]
    name: str = "default"
    tokens: Mapping[str, TrainableTokensWrapper] = field(default_factory=dict)
    outside: Outside = field(default_factory=lambda: Outside(tensors={}, why={}))
    notes: tuple[str, ...] = ()

    @property
    def base_name(self) -> str | None:
        """The base model's hub name or folder, if anybody knows it."""
        return base_name(self.root, self.config)


def read(model: nn.Module, name: str | None, profile: str, *, other_base: bool = False) -> Live:
    """Read the adapters, with their gates or form folded in, the heads, and what else the profile needs.

    Args:
        model: with adapters, or (where `profile` is "merged") without.
        name: PEFT's adapter name, None for the active one.
        profile: what it is read for.
        other_base: the adapter is merged into another base, so that nothing else may have been trained.

    Raises:
        AdapterError: there are none, or not plain LoRA.
        ExportError: the state or the settings of the model have no place in the profile.
    """
    root, merges = base_of(model), profile == "merged"
    if merges and not getattr(model, "peft_config", None):
        return Live(root=root, config=None, pairs={}, heads={})
    name = adapter_name(model, name)
    config: LoraConfig = getattr(model, "peft_config")[name]  # noqa: B009
    scales = {adapter.name: adapter.scale for adapter in adapters(model, name)}
    _check_state(model, name)
    bare = [path for path, layer in lora_layers(model, name) if experts_of(layer) is not None]
    if bare and profile not in ("native", "merged"):
        raise ExportError(
            f"profile {profile!r} cannot hold {len(bare)} adapters on bare parameters ({bare[0]}, ...): servers read"
            " those of experts in no common form; use profile 'native' or 'merged'"
        )
    heads, tokens = saved_modules(root, name), token_wrappers(root, name)
    outside = Outside(tensors={}, why={})
    if not merges or other_base:
        _check_settings(model, name, config)
        outside = find_outside(model, root, None if merges else base_name(root, config), list(heads))
        if profile != "native":
            _check_carried(profile, root, heads, tokens, outside, other_base=other_base)
    pairs: dict[str, Pair] = {}
    zeros = moved = 0
    for path, layer in lora_layers(model, name):
        pair = _pair(layer, name, scales[path])
        zeros += pair is None
        moved += taken(layer, name) is not None
        if pair is not None:
            pairs[path] = pair
    if not pairs and not merges:
        raise ExportError("every gate is zero, so no adapter is left to export; select with k of 1 or more")
    notes = [*(() if merges else outside.notes)]
    if zeros:
        notes.append(f"{zeros} of {zeros + len(pairs)} adapters have a gate of zero and were left out")
    if moved and not merges:
        notes.append(
            f"{moved} adapters were initialised from the base's weights: for the stock base they have both ranks"
        )
    return Live(
        root=root, config=config, pairs=pairs, heads=heads, name=name, tokens=tokens, outside=outside,
        notes=tuple(notes),
    )  # fmt: skip


def _pair(layer: AdapterLayer, name: str, scale: float) -> Pair | None:
    """What the layer adds to the weight of a stock base: ``s omega B A``, less what an initialisation took from it."""
    A, B, gate = computing_factors(layer, name)
    A, B, omega = A.detach().cpu(), B.detach().cpu(), 1.0 if gate is None else float(gate.detach())
    had = taken(layer, name)
    if had is not None:
        gone = had.B.cpu() * -(had.scale / scale)
        return Pair(torch.cat([A, had.A.cpu().to(A)]), torch.cat([(B * omega).to(B), gone.to(B)], 1), scale)
    turned = isinstance(layer, ParamWrapper) and not layer._did_swap_in_out_features
    return None if omega == 0.0 else Pair(A.clone(), (B * omega).to(B), scale, experts_of(layer), turned)


def _check_state(model: nn.Module, name: str) -> None:
    """The live logits must be those of this adapter alone, on an untouched base."""
    active = getattr(model, "active_adapters", None)
    active = list(active() if callable(active) else active or [name])
    if active != [name]:
        raise ExportError(f"adapter {name!r} is not active ({active} is); call model.set_adapter({name!r}) first")
    for path, module in base_of(model).named_modules():
        if isinstance(module, LoraLayer) and module.merged:
            raise ExportError(f"the adapter on {path} is merged into its base; call model.unmerge_adapter() first")
        if isinstance(module, LoraLayer) and module.disable_adapters:
            raise ExportError("the adapters are disabled; call model.base_model.enable_adapter_layers() first")
        if isinstance(module, LoraLayer) and name in module.lora_embedding_A:
            raise ExportError(f"{path} is an embedding with LoRA; only linear layers can be exported, target those")


def _check_settings(model: nn.Module, name: str, config: LoraConfig) -> None:
    init = moved_by(model, name)
    if init is not None and any(taken(layer, name) is None for _, layer in lora_layers(model, name)):
        raise ExportError(
            f"init_lora_weights={init!r} moved a part of the base into the adapter, so it no longer fits a stock base,"
            " and that part was not recorded; use profile 'merged', or train with weightlora.fit or attach"
        )
    if config.layer_replication:
        raise ExportError(
            "layer_replication changes the layers of the base, which an adapter cannot hold; use profile 'merged'"
        )


def _check_carried(
    profile: str, root: nn.Module, heads: Mapping[str, nn.Module], tokens: Mapping[str, object], outside: Outside, *,
    other_base: bool,
) -> None:  # fmt: skip
    """Everything beside the adapters must be one that travels in a profile for servers, or into another base."""
    where = "base=" if other_base else f"profile {profile!r}"
    instead = "leave base= out" if other_base else "use profile 'native' or 'merged'"
    if outside.tensors:
        raise ExportError(
            f"{where} cannot hold {len(outside.tensors)} weights of the base that differ from a stock base's"
            f" ({outside}); {instead}, or name their modules in modules_to_save before training"
        )
    if tokens and not other_base:
        raise ExportError(f"{next(iter(tokens))} trains single tokens, which {where} cannot hold; {instead}")
    tied = None if other_base else tied_head(root, heads)
    if tied is not None:
        raise ExportError(
            f"{tied[0]} was trained as a whole, but a stock base ties it to {tied[1]}: loaded there from {HEAD} it"
            f" would change both; {instead}"
        )


def complete(root: nn.Module, pairs: Mapping[str, Pair], *, everywhere: bool) -> list[str]:
    """Names of linear layers that need a zero adapter, in module order.

    Those that servers fuse with a live one; `everywhere`: and those at the same places of other blocks, where a place
    is the name without the numbers in it (``model.layers.*.self_attn.q_proj``).
    """
    linear = [name for name, module in root.named_modules() if shape_of(module) is not None]
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


def shape_of(module: nn.Module) -> tuple[int, int] | None:
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
    assert live.config is not None
    config.bias, config.trainable_token_indices = live.config.bias, live.config.trainable_token_indices
    config.ensure_weight_tying = live.config.ensure_weight_tying
    tensors = _tensors(live.pairs)
    outside = live.outside.tensors
    for key, value in outside.items():
        tensors[PREFIX + file_name(key, wrapped(live.pairs), list(live.tokens))] = value.detach().cpu().clone()
    for path, wrapper in live.tokens.items():
        adapter = wrapper.token_adapter
        if not adapter.tied_adapter:
            delta = adapter.trainable_tokens_delta[live.name].detach().cpu().clone()
            tensors[f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"] = delta
    for path, head in live.heads.items():
        tensors |= {f"{PREFIX}{path}.{key}": value for key, value in _state(head).items()}
    reasons = []
    if config.rank_pattern or config.alpha_pattern:
        reasons.append("ranks or scales differ, which vLLM ignores and SGLang refuses")
    if live.heads:
        reasons.append("a trained head is inside, which vLLM refuses")
    if live.tokens:
        reasons.append("single trained tokens are inside")
    if outside:
        reasons.append(f"{len(outside)} weights of the base are inside ({live.outside}), which loading writes into it")
    servers = "'merged'" if live.tokens or outside else "'portable' or 'merged'"
    note = f"for PEFT only ({'; '.join(reasons)}): use profile {servers} for servers"
    return config, tensors, (note,) if reasons else ()


def _portable(live: Live, *, everywhere: bool) -> tuple[LoraConfig, dict[str, Tensor], tuple[str, ...]]:
    rank = max(pair.rank for pair in live.pairs.values())
    zeros = complete(live.root, live.pairs, everywhere=everywhere)
    like = next(iter(live.pairs.values())).A
    pairs = {path: pair.padded(rank) for path, pair in live.pairs.items()}
    for path in zeros:
        d_in, d_out = shape_of(live.root.get_submodule(path)) or (0, 0)
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
    bare = [path for path in targets if path in live.pairs and live.pairs[path].experts is not None]
    config.target_modules = [path for path in targets if path not in bare]
    config.target_parameters = bare or None
    if task is None:
        kind = type(live.root)
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return config


def wrapped(pairs: Mapping[str, Pair]) -> Counter[str]:
    """How many of PEFT's wrappers are around each module: one for a layer, one for each of its bare parameters."""
    return Counter(path if pair.experts is None else path.rpartition(".")[0] for path, pair in pairs.items())


def _tensors(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    tensors, outside = {}, wrapped(pairs)
    for path, pair in pairs.items():
        module = path if pair.experts is None else path.rpartition(".")[0]
        outside[module] -= 1  # the last parameter of a module has the outermost wrapper
        key = PREFIX + module + ".base_layer" * outside[module]
        tensors[f"{key}.lora_A.weight"] = pair.A.contiguous()
        tensors[f"{key}.lora_B.weight"] = pair.B.contiguous()
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
