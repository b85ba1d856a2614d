"""One short step on the machine at hand: how far what is measured lies from what was predicted."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from weightlora.cost.measure import isolated_rng, kept_bytes
from weightlora.cost.tensors import trained
from weightlora.errors import ConfigError
from weightlora.graft import checkpoint_blocks, fast_path
from weightlora.runs.plan import Planner
from weightlora.runs.plan_config import PlanConfig, adapted, loss_of


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
        ConfigError: quantised weights, which random ones cannot stand in for; no such device; the plan assumes another.
    """
    if config.quantization is not None:
        raise ConfigError("a probe runs on random weights, which are not quantised; plan without it, or unquantised")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device to probe; plan without the probe")
    if device != config.device:
        raise ConfigError(f"the plan assumes the kernels of {config.device}; a probe on {device} cannot correct it")
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
            measured = _peak(model, loss)
            return Calibration(
                kind="peak",
                micro_batch=micro_batch,
                predicted=planner.estimate.parts(phase, micro_batch).total - planner.overhead,
                measured=measured,
            )
        kept = kept_bytes(model, loss)
    gates = 4 * planner.n if phase.gated else 0  # the probe trains plain adapters
    predicted = planner.estimate.activations(phase, micro_batch) - gates
    return Calibration(kind="kept", micro_batch=micro_batch, predicted=predicted, measured=kept)


def _peak(model: nn.Module, loss: Any) -> int:
    """Peak of the allocator over two whole steps with AdamW, whose state exists only after the first."""
    gc.collect()
    torch.cuda.empty_cache()
    inside, outside = trained(model)
    optimizer = torch.optim.AdamW([*inside, *outside])
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())
