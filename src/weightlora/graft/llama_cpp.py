"""The adapter as llama.cpp reads it: one GGUF file, and the way back, by which it is verified."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from weightlora.errors import ExportError
from weightlora.graft.profiles import Live, Pair, write_adapter
from weightlora.graft.surgery import common
from weightlora.graft.verify import HEAD

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter.gguf"
# Transformers' model types that were run in llama.cpp: its architecture, and whether it keeps the rows of q and k in
# another order (the two halves of each rotary head interleaved).
FAMILIES: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
)
_CONVERTER = "profile 'portable' and llama.cpp's own convert_lora_to_gguf.py"


def write_gguf(live: Live, folder: Path) -> tuple[int, tuple[str, ...]]:
    """Write ``adapter.gguf``; returns the highest rank and the notes.

    llama.cpp scales each product by ``alpha / r`` with one alpha and the tensor's own r. So ranks stay as they are, and
    adapters whose alpha is not the most common one have the rest of their scale folded into B.

    Raises:
        ExportError: another family, a layer that llama.cpp has no tensor for, a trained head, or no gguf package.
    """
    import gguf

    arch, names = _names(live.root, live.pairs)
    if live.heads:
        raise ExportError(
            f"{next(iter(live.heads))} was trained as a whole, and llama.cpp loads no {HEAD}; use profile 'merged' and"
            " convert that"
        )
    rows = _row_orders(live.root)
    alpha = common(list(live.pairs.values()))[1] or 1.0
    writer = gguf.GGUFWriter(folder / ADAPTER, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for path, pair in live.pairs.items():
        B = pair.B.double() * (pair.scale * pair.rank / alpha)
        writer.add_tensor(f"{names[path]}.weight.lora_a", pair.A.float().contiguous().numpy())
        writer.add_tensor(f"{names[path]}.weight.lora_b", rows(path, B).float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    notes = (
        f"llama.cpp: llama-server -m BASE.gguf --lora {ADAPTER}",
        "BASE.gguf is the base by llama.cpp's own converter: convert_hf_to_gguf.py BASE --outfile BASE.gguf",
    )
    return max(pair.rank for pair in live.pairs.values()), (*live.notes, *notes)


def gguf_as_peft(live: Live, folder: Path, out: Path) -> None:
    """Read ``adapter.gguf`` and write what it says as a stock PEFT adapter, for the base of `live`."""
    import gguf

    reader = gguf.GGUFReader(folder / ADAPTER)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    _, names = _names(live.root, live.pairs)
    rows = _row_orders(live.root, back=True)
    pairs = {}
    for path, name in names.items():
        A, B = found[f"{name}.weight.lora_a"], found[f"{name}.weight.lora_b"]
        pairs[path] = Pair(A, rows(path, B), alpha / A.shape[0])
    write_adapter(replace(live, pairs=pairs), out, "native")


def _names(root: nn.Module, pairs: Mapping[str, object]) -> tuple[str, dict[str, str]]:
    """llama.cpp's architecture, and its names of the adapted layers."""
    if importlib.util.find_spec("gguf") is None:
        raise ExportError("profile 'gguf' needs the package gguf, not installed here; run: pip install gguf")
    import gguf

    kind = str(getattr(getattr(root, "config", None), "model_type", type(root).__name__))
    if kind not in FAMILIES:
        raise ExportError(f"profile 'gguf' knows {', '.join(FAMILIES)}, and this model is {kind!r}; use {_CONVERTER}")
    arch = FAMILIES[kind][0]
    places = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(places[arch], root.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
    names = {path: name for path in pairs if (name := known.get_name(path)) is not None}
    lost = [path for path in pairs if path not in names]
    if lost:
        raise ExportError(f"llama.cpp has no tensor for an adapter on {lost[0]}; use {_CONVERTER}")
    tied = [path for path in pairs if root.get_submodule(path) is _output(root)]
    if tied and root.config.tie_word_embeddings:  # type: ignore[union-attr]
        raise ExportError(
            f"{tied[0]} is tied to the embedding, and llama.cpp reads no adapter for a tied layer; leave it out"
            " of target_modules"
        )
    return arch, names


def _output(root: nn.Module) -> nn.Module | None:
    found: nn.Module | None = root.get_output_embeddings()  # type: ignore[operator]
    return found


def _row_orders(root: nn.Module, *, back: bool = False) -> Callable[[str, Tensor], Tensor]:
    """How GGUF orders the rows of a layer's B: those of q and k ``(heads, 2, d / 2) -> (heads, d / 2, 2)``; or back."""
    config = cast("PreTrainedModel", root).config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    permuted = FAMILIES[config.model_type][1]

    def order(path: str, B: Tensor) -> Tensor:
        count = heads.get(path.rpartition(".")[2])
        if not permuted or count is None:
            return B
        inner = (count, -1, 2) if back else (count, 2, -1)
        return B.reshape(*inner, B.shape[1]).transpose(1, 2).reshape(B.shape)

    return order
