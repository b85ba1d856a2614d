"""What a phase of a run cost, and what several K would: plain data, which records keep. Loads nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from weightlora.decoding import require
from weightlora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PhaseResult:
    """Hold what one phase did and cost: a stretch of training in which no tensor changes shape.

    Args:
        name: ``"warmup"`` or ``"final"``.
        steps: optimizer steps done.
        seconds: wall time of those steps, without work that was lost because a process died before a checkpoint.
        micro_batch: examples in one forward pass.
        accumulation: forward passes in one optimizer step.
        trainable_params: numbers the optimizer moves.
        kept_activation_bytes: bytes autograd keeps for the backward pass of one micro-batch, parameters excluded.
        flops_per_step: floating point operations of one optimizer step, all its micro-batches together.
        peak_memory_bytes: the device's peak, where the device can tell.

    Raises:
        ConfigError: a number that no phase has.
    """

    name: str
    steps: int
    seconds: float
    micro_batch: int | None
    accumulation: int | None
    trainable_params: int
    kept_activation_bytes: int | None
    flops_per_step: int | None
    peak_memory_bytes: int | None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, (int, float)) and not value >= 0:  # NaN is no cost either
                raise ConfigError(f"phase {self.name!r}: {each.name} is {value}; it cannot be negative or undefined")
            if isinstance(value, int) and value >= 2**63:
                raise ConfigError(f"phase {self.name!r}: {each.name} has {value.bit_length()} bits; 63 are enough")

    @property
    def seconds_per_step(self) -> float | None:
        """Wall time of one optimizer step in seconds; None before the first step."""
        return self.seconds / self.steps if self.steps else None


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """Hold what the best ``k`` adapters by score have of the total score, and what a step with them costs.

    Args:
        k: how many.
        share: of the total score.
        kept_activation_bytes: kept for the backward pass of one micro-batch.
        flops_per_step: floating point operations of one optimizer step, never too few, and too many by less
            than those of a block; None where they cannot be counted.

    Raises:
        ConfigError: a number that no set of adapters has.
    """

    k: int
    share: float
    kept_activation_bytes: int
    flops_per_step: int | None = field(default_factory=type(None))  # older records have none

    def __post_init__(self) -> None:
        sizes = (self.k, self.kept_activation_bytes, self.flops_per_step or 0)
        require(all(0 <= size < 2**63 for size in sizes), f"frontier has {sizes}, out of range")
        require(0 <= self.share <= 1.000001, f"frontier has a share of {self.share}; it must be one")
