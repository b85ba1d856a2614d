"""Plans of models by name: the model without weights, and one real step of it to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import peft
import torch
from torch import Tensor, nn

from weightlora.cost import Planner, Traced, isolated_rng, kept_bytes
from weightlora.cost.measure import step_peak
from weightlora.cost.plan import Traces
from weightlora.cost.plan_spec import PlanConfig
from weightlora.errors import ConfigError
from weightlora.graft.depth import checkpoint_blocks
from weightlora.graft.fast import fast_path
from weightlora.runs.targets import TASK_TYPES, placed, targets
from weightlora.tasks.skeletons import Skeleton, skeleton


def planner_for(config: PlanConfig, overhead: int = 0, traces: Traces | None = None) -> Planner:
    """A planner that builds models from their names.

    Args:
        config: what is planned.
        overhead: bytes that :func:`calibrate` measured beyond the prediction.
        traces: of other planners, to be used again.

    Raises:
        ConfigError, AdapterError: the model or its targets are not there.
    """
    return Planner(config, _traced, overhead, traces)


def _traced(config: PlanConfig) -> Traced:
    bones, model = adapted(config)
    return Traced.of(
        model,
        lambda size: loss_of(model, bones.batch(size, config.length), config.autocast),
        length=config.length,
        stock=config.engine == "stock",
        cuda=config.device == "cuda",
    )


def adapted(config: PlanConfig, device: str = "meta") -> tuple[Skeleton, nn.Module]:
    """The model of a plan with an adapter on each target.

    Raises:
        ConfigError, AdapterError: the model or its targets are not there.
    """
    bones = skeleton(
        config.model,
        dtype=getattr(torch, config.dtype) if config.dtype else None,
        head=config.head,  # type: ignore[arg-type]  # checked by the configuration
        num_labels=config.num_labels,
        device=device,
    )
    lora = peft.LoraConfig(
        task_type=TASK_TYPES[bones.head],
        r=config.r,
        lora_alpha=config.r,
        lora_dropout=config.dropout,
        **placed(targets(config.targets, bones), bones, config.dropout),
        modules_to_save=list(bones.heads) or None,
    )
    return bones, peft.get_peft_model(bones.model, lora).train()


def loss_of(model: nn.Module, batch: Mapping[str, Tensor], on: bool, device: str = "cpu") -> Callable[[], Tensor]:
    """The forward pass of a batch, under bfloat16 autocast where `on`."""

    def loss() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=on):
            found: Tensor = model(**batch).loss
            return found

    return loss


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one step took, in bytes.

    ``kind``: "peak" is the allocator's peak of a whole step on a CUDA device; "kept" is what autograd held between
    forward and backward, counted on any machine. ``overhead``: measured minus predicted, what later plans add (0 for
    "kept", which says nothing about an allocator).
    """

    kind: Literal["peak", "kept"]
    micro_batch: int
    predicted: int
    measured: int

    @property
    def overhead(self) -> int:
        """Bytes to add to a prediction; never negative, so that a plan stays on the safe side."""
        return max(0, self.measured - self.predicted) if self.kind == "peak" else 0


def calibrate(config: PlanConfig, planner: Planner, device: str, micro_batch: int = 1) -> Calibration:
    """Run one step of warm-up, with every adapter, on random weights, and compare.

    Args:
        config: what is planned.
        planner: of the same configuration, for the same kind of device.
        device: "cuda", or "cpu", where bytes are counted.
        micro_batch: examples of that step; the smallest is the one that fits where anything fits.

    Raises:
        ConfigError: quantised weights, which random ones cannot stand in for; no such device; the plan assumes another,
            or several.
    """
    if config.quantization is not None:
        raise ConfigError("--probe runs on random weights, which are not quantised; drop --probe, or --quantization")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch finds no CUDA device for --probe; drop --probe, or use --device cpu")
    if config.devices > 1:
        raise ConfigError(
            f"--probe runs on one device, and the plan is for {config.devices}; drop --probe, or use --devices 1"
        )
    if device != config.device:
        raise ConfigError(
            f"the plan is for the kernels of {config.device}, which a probe on {device} cannot"
            " correct; use the same device"
        )
    phase = planner.warmup()
    with isolated_rng():
        bones, model = adapted(config, device)
        batch = {key: value.to(device) for key, value in bones.batch(micro_batch, config.length).items()}
        if config.engine != "stock":
            fast_path(model)
        if config.checkpointing:
            checkpoint_blocks(bones.model)
        loss = loss_of(model, batch, config.autocast, device)
        if device == "cuda":
            predicted = planner.estimate.cost(phase, micro_batch).total - planner.overhead
            measured = step_peak(model, loss)
            return Calibration(kind="peak", micro_batch=micro_batch, predicted=predicted, measured=measured)
        measured = kept_bytes(model, loss)
    plain = replace(phase, gated=False)  # as what ran
    predicted = planner.estimate.activations(plain, micro_batch)
    return Calibration(kind="kept", micro_batch=micro_batch, predicted=predicted, measured=measured)
