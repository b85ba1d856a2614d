"""The small file that is read before a model is rebuilt: what structure the checkpoint beside it has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weightlora.decoding import decode
from weightlora.errors import CheckpointError
from weightlora.files import new_file, write_text
from weightlora.graft.adapters import Adapter, base_of
from weightlora.graft.quantised import stored
from weightlora.graft.selection import Selection

MANIFEST = "weightlora.json"
STATE = "weightlora.safetensors"
SCHEMA_VERSION = 1

Stage = Literal["warmup", "final"]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Structure and progress of one checkpoint.

    ``stage`` is "warmup" (gates on, all n adapters present) or "final" (stock LoRA on the survivors). ``adapters`` are
    the n adapters that the run started with; ``method`` the method's own settings; ``data`` whatever the trainer's
    side must know. ``base`` is the base model's :func:`fingerprint`.
    """

    stage: Stage
    step: int
    adapter: str
    adapters: tuple[tuple[str, int, int, int], ...]
    method: dict[str, object]
    base: str
    selection: Selection | None = None
    data: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @staticmethod
    def describe(live: Sequence[Adapter]) -> tuple[tuple[str, int, int, int], ...]:
        """``(name, d_in, d_out, rank)`` of each adapter: what makes two models the same to a checkpoint."""
        return tuple((a.name, a.d_in, a.d_out, a.rank) for a in live)

    def check_same_model(self, live: Sequence[Adapter], base: str) -> None:
        """Raise CheckpointError, naming the first difference, unless the model has the run's adapters and base."""
        here = self.describe(live)
        if here == self.adapters:
            if self.base != base:
                raise CheckpointError(
                    "the checkpoint belongs to another base model of the same shape: its configuration or weights"
                    " differ; use the base (name, revision, seed, dtype) that the run started with"
                )
            return
        if len(here) != len(self.adapters):
            detail = f"it was made with {len(self.adapters)} adapters, this model has {len(here)}"
        else:
            old, new = next((a, b) for a, b in zip(self.adapters, here, strict=True) if a != b)
            detail = f"it was made with {old[0]} {old[1:]}, this model has {new[0]} {new[1:]} (d_in, d_out, rank)"
        raise CheckpointError(f"the checkpoint belongs to another model: {detail}; use the model the run started with")

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, then the manifest, each atomically: a manifest that can be read has its tensors beside it."""
        with new_file(folder / STATE) as temporary:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
        write_text(folder / MANIFEST, self.to_json())

    def to_json(self) -> str:
        """Strict JSON, selection included."""
        data = {**asdict(self), "selection": None if self.selection is None else self.selection.to_dict()}
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> tuple[Manifest, dict[str, Tensor]]:
        """Read a manifest and its tensors.

        Raises:
            CheckpointError: a file is missing or damaged; the message names it.
        """
        path = folder / MANIFEST
        try:
            return cls._decoded(json.loads(path.read_text(encoding="utf-8")), path), load_file(folder / STATE)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: not a whole checkpoint, {Path(error.filename or STATE).name} is missing"
            ) from None
        except SafetensorError as error:
            raise CheckpointError(f"{folder / STATE} is damaged: {error}") from None
        except CheckpointError:
            raise
        except (ValueError, RecursionError) as error:  # no JSON
            raise CheckpointError(f"{path} is damaged: {error}") from None

    @classmethod
    def _decoded(cls, data: object, path: Path) -> Manifest:
        """The manifest that a JSON value holds, checked."""
        if not isinstance(data, dict) or "schema_version" not in data:
            raise CheckpointError(f"{path} is damaged: it has no key 'schema_version'")
        if data["schema_version"] != SCHEMA_VERSION:
            raise CheckpointError(
                f"{path}: manifest schema {data['schema_version']} is not supported; this release reads"
                f" {SCHEMA_VERSION}"
            )
        try:
            if unknown := sorted(set(data) - {f.name for f in fields(cls)}):
                raise CheckpointError(f"it has {unknown[0]!r}, which this release does not know")
            manifest: Manifest = decode(cls, data, "")
            if not 0 <= manifest.step < 2**53 or (manifest.stage == "final") != (manifest.selection is not None):
                raise CheckpointError(f"stage {manifest.stage!r} at step {manifest.step} and the selection do not fit")
            if manifest.selection is not None:
                manifest.selection.check()
                if [c.name for c in manifest.selection.choices] != [name for name, *_ in manifest.adapters]:
                    raise CheckpointError("its selection is about other adapters")
        except CheckpointError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        return manifest


# Of a base model's configuration: what changes its function and no shape.
_SETTINGS = ("model_type", "hidden_act", "activation_function", "hidden_activation", "layer_norm_eps", "rms_norm_eps",
             "num_attention_heads", "num_key_value_heads", "rope_theta", "vocab_size", "position_buckets")  # fmt: skip
SAMPLED_TENSORS, SAMPLED_NUMBERS = 16, 256


def fingerprint(model: nn.Module) -> str:
    """A short hash that tells base models of one shape apart: settings, and some numbers of some frozen weights.

    Args:
        model: with adapters, before any training or surgery. Weights that train are left out.
    """
    digest = hashlib.sha256()
    config = getattr(base_of(model), "config", None)
    for name in _SETTINGS:
        digest.update(f"{name}={getattr(config, name, None)!r};".encode())
    frozen = [p for n, p in model.named_parameters() if not p.requires_grad and "lora_" not in n and p.numel()]
    for weight in frozen[:: max(1, len(frozen) // SAMPLED_TENSORS)]:
        if weight.is_meta:
            continue
        flat = stored(weight.detach())[0].reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLED_NUMBERS)][:SAMPLED_NUMBERS]
        digest.update(some.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()[:32]


def readable(path: Path) -> bool:
    """Whether a safetensors file has the length that its header says."""
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False
