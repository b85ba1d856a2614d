"""What is planned, and how it can be changed to take less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from weightlora.cost.tensors import QUANTIZATIONS, optimizer_bytes
from weightlora.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is planned.

    Args:
        model: a name that whoever builds the model knows, a hub name, a folder, a config file.
        head, num_labels: what is on top; None: what the config says.
        targets: "all-linear", "attention", or endings of module names, comma-separated.
        r: rank of every adapter. k: adapters that survive, a count or a share.
        dtype: of the weights: float32, bfloat16, float16; None: what the config says.
        autocast: float32 weights computing in bfloat16, as ``--bf16`` of the trainer does.
        quantization: "8bit", "4bit" or "4bit-double" (bitsandbytes), or None.
        dropout: of the adapters.
        batch: examples of one optimizer step; a micro-batch divides it. length: tokens per example.
        optimizer: as in ``TrainingArguments.optim``.
        checkpointing: gradient checkpointing of every block.
        engine: "auto", or "stock" for PEFT's own forward.
        device: "cuda" or "cpu": whose kernels for dropout and attention are assumed.
        gated: omega is kept during warm-up.
        lowest: the block of the lowest survivor, 0 = the first; None: the worst case, the first with a target.

    Raises:
        ConfigError: a value that is not allowed.
    """

    model: str = "minilm"
    head: str | None = None
    num_labels: int = 2
    targets: str = "all-linear"
    r: int = 8
    k: int | float = 0.25
    dtype: str | None = None
    autocast: bool = False
    quantization: str | None = None
    dropout: float = 0.05
    batch: int = 16
    length: int = 128
    optimizer: str = "adamw_torch"
    checkpointing: bool = False
    engine: str = "auto"
    device: str = "cuda"
    gated: bool = True
    lowest: int | None = None

    def __post_init__(self) -> None:
        for name in ("r", "batch", "length", "num_labels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not allowed; use 1 or more")
        if self.k <= 0 or (isinstance(self.k, float) and self.k > 1):
            raise ConfigError(f"k={self.k} is not allowed; use a count of 1 or more, or a share such as 0.25")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} is not allowed; use 0 or more and less than 1")
        choices = {"dtype": (None, *DTYPES), "device": ("cuda", "cpu")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(value for value in allowed if value)
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown; use {known}")
        optimizer_bytes(self.optimizer, [])  # refuses what it does not know
        if self.quantization not in (None, *QUANTIZATIONS):
            known = ", ".join(QUANTIZATIONS)
            raise ConfigError(f"the quantisation {self.quantization!r} is unknown; use one of {known}")


def changes_of(config: PlanConfig, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Changes to a configuration that save memory, from the least to the most intrusive."""
    steps: list[dict[str, Any]] = []
    if config.r > 1:
        steps.append({"r": max(1, config.r // 4)})
    base: dict[str, Any] = {} if config.checkpointing else {"checkpointing": True}
    steps += [base] if base else []
    if dtype == torch.float32:
        base = {**base, "dtype": "bfloat16", **({"autocast": False} if config.autocast else {})}
        steps.append(base)
    for name in QUANTIZATIONS[:2]:
        if config.quantization is None or (config.quantization == "8bit" and name == "4bit"):
            steps.append({**base, "quantization": name})
    last, length = steps[-1] if steps and "r" not in steps[-1] else {}, config.length // 2
    while length >= 64:
        steps.append({**last, "length": length})
        length //= 2
    return steps


def flag(name: str, value: Any) -> str:
    """A change as it is written on the command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"no --{name}"
    return f"--{name} {value}"
