"""What ``fit`` hands back: a model, what was kept, and what each phase cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import nn
from transformers import Trainer

from weightlora.cost.measure import PeakMemory, StepCost
from weightlora.cost.results import FrontierPoint, PhaseResult
from weightlora.decoding import decode_part
from weightlora.errors import CheckpointError, ConfigError
from weightlora.graft.selection import Selection
from weightlora.methods import Method


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """Hold what :func:`fit` returns: a plain PEFT model, what was kept and why, and what each phase cost.

    ``adapter_params``: parameters of adapters, without heads, by the method's own formula: ``allocated``, ``trainable``
    until the seam, trained at the ``peak`` of the run, and ``effective`` at the end. ``predicted``: ``{phase: {field:
    number}}``, as computed before the first step. ``frontier``: for several k, the share of the total score that the
    best k adapters have, and what they cost.
    """

    model: nn.Module
    method: Method
    selection: Selection | None
    phases: tuple[PhaseResult, ...]
    metrics: Mapping[str, float]
    max_steps: int
    seam_step: int | None
    adapter_params: Mapping[str, int] = field(default_factory=dict)
    predicted: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    frontier: tuple[FrontierPoint, ...] = ()
    log_history: tuple[dict[str, float], ...] = field(default=(), repr=False)


def phase_result(
    trainer: Trainer,
    name: Literal["warmup", "final"],
    steps: int,
    seconds: float,
    trainable: int,
    cost: StepCost | None,
    peak: PeakMemory,
) -> PhaseResult:
    """One phase of a trainer, as it ran."""
    accumulation = trainer.args.gradient_accumulation_steps
    return PhaseResult(
        name=name,
        steps=steps,
        seconds=seconds,
        micro_batch=trainer.args.per_device_train_batch_size,
        accumulation=accumulation,
        trainable_params=trainable,
        kept_activation_bytes=None if cost is None else cost.kept_activation_bytes,
        flops_per_step=None if cost is None else cost.flops * accumulation,
        peak_memory_bytes=peak.bytes(),
    )


def read_progress(data: Mapping[str, object], where: Path) -> tuple[float, list[PhaseResult]]:
    """Seconds of the current phase and the phases before it, from a manifest's data.

    Raises:
        CheckpointError: they are damaged.
    """
    try:
        phases = decode_part(tuple[PhaseResult, ...], {"phases": [], **data}, "phases", where)
    except ConfigError as error:
        raise CheckpointError(f"{where}: the manifest is damaged: {error}") from None
    spent: float = decode_part(float, {"seconds": 0.0, **data}, "seconds", where)
    if not 0 <= spent < 2**63:
        raise CheckpointError(f"{where}: the manifest is damaged: {spent!r} is no cost of a phase")
    return spent, list(phases)
