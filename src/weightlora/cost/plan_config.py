"""How what is planned can be changed to take less."""

from __future__ import annotations

from typing import Any

import torch

from weightlora.cost.plan_spec import PlanConfig
from weightlora.cost.tensors import QUANTIZATIONS


def changes_of(config: PlanConfig, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Changes to a configuration that save memory, from the least to the most intrusive."""
    steps: list[dict[str, object]] = []
    if config.r > 1:
        steps.append({"r": max(1, config.r // 4)})
    base: dict[str, object] = {} if config.checkpointing else {"checkpointing": True}
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


def flag(name: str, value: object) -> str:
    """A change as it is written on the command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"no --{name}"
    return f"--{name} {value}"
