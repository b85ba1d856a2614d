"""Hand over the result: stock PEFT adapters, server-ready ones, or a merged model, each reloaded before it is called done."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from weightlora.errors import ConfigError, ExportError
from weightlora.files import new_folder
from weightlora.graft.adapters import adapter_name, adapters, base_of, factors, lora_layers
from weightlora.graft.card import model_card
from weightlora.graft.selection import Selection
from weightlora.graft.verify import (
    HEAD,
    PREFIX,
    WEIGHTS,
    compare,
    isolated,
    logits,
    plain_base,
    reload_adapter,
    reload_merged,
    sample_logits,
)

Profile = Literal["native", "portable", "dense", "merged"]
PROFILES: tuple[str, ...] = get_args(Profile)

RECORD, HEAD_NAMES = "export.json", "head.json"
SCHEMA_VERSION = 1
# What vLLM's --max-lora-rank may be.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Linear layers of one parent that servers fuse into one, so that they want adapters on all of them or on none.
FUSED = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"query", "key", "value"}),
    frozenset({"query_proj", "key_proj", "value_proj"}),
    frozenset({"gate_proj", "up_proj"}),
)
# Initial values that leave the base model's weights as they were; PEFT's others move a part of them into the adapter.
_HARMLESS_INIT = ("gaussian", "eva", "orthogonal")


class Fitted(Protocol):
    """Anything with a PEFT model and, if there was one, the selection: what ``wl.fit`` returns."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def selection(self) -> Selection | None: ...


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written, and how well it reproduces the live model.

    ``max_difference`` of the logits is at most ``tolerance``. ``rank`` is the highest rank in the file (None: merged).
    ``notes`` are sentences for people.
    """

    path: Path
    profile: str
    max_difference: float
    tolerance: float
    rank: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Pair:
    """One adapter to write: A (r, d_in) and omega B (d_out, r) on the CPU, and s."""

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    @property
    def alpha(self) -> float:
        """PEFT's alpha: a whole number where it is one but for rounding, so that files read as people wrote them."""
        value = self.scale * self.rank
        return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


@dataclass(frozen=True)
class _Live:
    """The live model, read: its base, PEFT's config, its non-zero adapters in module order, its trained heads."""

    root: nn.Module
    config: LoraConfig | None
    pairs: dict[str, _Pair]
    heads: dict[str, nn.Module]
    left_out: int = 0

    @property
    def base(self) -> str | None:
        name = getattr(self.config, "base_model_name_or_path", None) or self.root.__dict__.get("name_or_path")
        return str(name) if name else None


def export(
    result: Fitted | nn.Module,
    out: str | Path,
    profile: str = "native",
    *,
    sample: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    base: nn.Module | None = None,
    overwrite: bool = False,
) -> Export:
    """Write the adapter (or the merged model) to a folder, reload it from there with stock software, and compare the logits.

    The folder appears only when it is whole and verified. The live model is not changed, and may be in the middle of a
    warm-up: gates are folded into B, and adapters whose gate is zero are left out.

    - ``native``: stock PEFT with the ranks and scales as trained, and trained heads inside.
    - ``portable`` (vLLM, SGLang, llama.cpp): one rank r with ``lora_alpha == r``, every scale folded into B, no patterns, no
      ``modules_to_save``, a list of full names as targets, and zero adapters that complete q/k/v and gate/up wherever one of
      them is live. vLLM and llama.cpp go by the names of the tensors; SGLang reads the last part of each listed name. A trained head cannot
      travel; it goes to ``head.safetensors``.
    - ``dense``: portable, with zero adapters at the same places of all other blocks.
    - ``merged``: a plain Transformers model with the deltas added into its weights, heads included.

    Args:
        result: what ``wl.fit`` returned, or a PEFT model. A model without adapters can be exported as ``merged``.
        out: the folder; new, empty, or an earlier export.
        profile: one of the four.
        sample: a batch (dict of tensors) to compare logits on; None: random token ids.
        adapter: PEFT's adapter name; default: the active one.
        base: merge into this full-precision model of the same structure instead of the base under the adapters.
        overwrite: replace whatever `out` holds.

    Returns:
        An :class:`Export`.

    Raises:
        ConfigError: the profile is unknown, or `base` is given to another profile than ``merged``.
        AdapterError: the model has no adapters, or of a kind that is not plain LoRA.
        ExportError: the folder is in use, the model cannot be written in this form, or the reloaded export differs.

    >>> import tempfile
    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> done = export(model, Path(tempfile.mkdtemp()) / "out", sample={"input": torch.ones(1, 4)})
    >>> done.profile, done.rank, done.max_difference <= done.tolerance
    ('native', 2, True)
    """
    if profile not in PROFILES:
        raise ConfigError(f"export profile {profile!r} is unknown; use one of {', '.join(PROFILES)}")
    if base is not None and profile != "merged":
        raise ConfigError(f"base= is the model to merge into, profile {profile!r} merges nothing; leave it out or use 'merged'")
    model, selection = (result, None) if isinstance(result, nn.Module) else (result.model, result.selection)
    path = _free_folder(out, overwrite)
    live = _read(model, adapter, profile)
    sample, truth = sample_logits(live.root, sample)
    try:
        with new_folder(path) as folder:
            if profile == "merged":
                rank, notes, again = _write_merged(live, folder, base, sample)
                if base is not None:
                    truth, again = again
            else:
                rank, notes = _write_adapter(live, folder, profile)
                reloaded, said = reload_adapter(plain_base(live.root), folder)
                notes = (*notes, *(f"stock PEFT warned on loading it: {text}" for text in said))
                again = (truth, logits(reloaded, sample))
            difference, tolerance = compare(truth, again[1] if isinstance(again, tuple) else again, live.root)
            done = Export(
                path=path, profile=profile, max_difference=difference, tolerance=tolerance, rank=rank, notes=notes
            )
            _write_papers(live, folder, done, selection)
    except OSError as error:
        raise ExportError(f"cannot write the export to {path}: {error.strerror or error}; use another folder") from error
    return done
