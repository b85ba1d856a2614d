"""PEFT's own tuners that are no plain LoRA: their configurations, what they train, and a verified copy on disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from weightlora.errors import AdapterError
from weightlora.files import new_folder
from weightlora.graft.adapters import base_of, is_adapter
from weightlora.graft.verify import compare, plain_base, reload_adapter, sample_logits
from weightlora.graft.verify import logits as logits_of

# For annotations in rooms that do not import PEFT.
LoraConfig: TypeAlias = peft.LoraConfig
PeftConfig: TypeAlias = peft.PeftConfig


def dora_config(lora: LoraConfig) -> LoraConfig:
    """The same ``LoraConfig`` with weight-decomposed adapters (DoRA)."""
    config = copy.deepcopy(lora)
    config.use_dora = True
    return config


def tuner_config(kind: str, lora: LoraConfig, **settings: object) -> PeftConfig:
    """A configuration of another tuner on the targets, heads and task of a ``LoraConfig``.

    >>> from peft import LoraConfig
    >>> tuner_config("VERA", LoraConfig(target_modules=["0"]), r=16).r
    16
    """
    config: PeftConfig = peft.get_peft_config(
        {
            "peft_type": kind,
            "task_type": lora.task_type,
            "target_modules": lora.target_modules,
            "modules_to_save": lora.modules_to_save,
            **settings,
        }
    )
    return config


def tuned_layers(model: nn.Module) -> tuple[str, ...]:
    """Full names of the layers that a PEFT tuner of any kind sits on, in module order."""
    return tuple(path for path, module in base_of(model).named_modules() if isinstance(module, BaseTunerLayer))


def check_tuner(model: nn.Module, kind: str) -> None:
    """Refuse a model that was not built for the method.

    Raises:
        AdapterError: there are no adapters, or of another kind.
    """
    found = _kinds(model)
    if found != {kind}:
        raise AdapterError(
            f"this method trains {kind} adapters, the model has {', '.join(sorted(found)) or 'none'}; build it with"
            " get_peft_model(base, method.peft_config(LoraConfig(...), shapes))"
        )


def refuse_own_format(model: nn.Module) -> None:
    """Refuse to write as plain LoRA what is none.

    Raises:
        AdapterError: the model has adapters, all of another kind.
    """
    found = _kinds(model)
    if found and "LORA" not in found:
        raise AdapterError(
            f"{', '.join(sorted(found))} is not plain LoRA, so no export profile can hold this adapter; save it"
            " in PEFT's own format with model.save_pretrained(FOLDER)"
        )


def _kinds(model: nn.Module) -> set[str]:
    """PEFT's names for the kinds of adapters on a model."""
    configs: Mapping[str, PeftConfig] = getattr(model, "peft_config", None) or {}
    return {"DORA" if getattr(c, "use_dora", False) else str(getattr(c.peft_type, "value", c.peft_type))
            for c in configs.values()}  # fmt: skip


def tuner_params(model: nn.Module) -> dict[str, int]:
    """Numbers in the adapters, heads excluded: ``allocated`` (frozen projections too), ``trainable``."""
    own = {p: p.requires_grad for n, p in model.named_parameters() if is_adapter(n)}
    buffers = {b for n, b in model.named_buffers() if is_adapter(n)}
    trainable = sum(p.numel() for p, trains in own.items() if trains)
    return {
        "allocated": sum(p.numel() for p in own) + sum(b.numel() for b in buffers),
        "trainable": trainable,
        "peak": trainable,
        "effective": trainable,
    }


def save_own_format(model: nn.Module, out: Path, sample: Mapping[str, object] | None) -> float:
    """Write the adapter in PEFT's own format, open it again with stock PEFT, and compare logits.

    Returns:
        The largest difference of logits.

    Raises:
        ExportError: the reloaded adapter computes something else; nothing is written then.
    """
    root = base_of(model)
    sample, truth = sample_logits(root, sample)
    with new_folder(out) as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        again, _ = reload_adapter(plain_base(root), folder)
        difference, _ = compare(truth, logits_of(again, sample), root)
    return difference
