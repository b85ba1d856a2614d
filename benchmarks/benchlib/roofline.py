"""How long a step takes at least on a device that is not there: every operation's bytes, operations and programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from weightlora.cost.standins import CudaKernels, stand_ins, standing_in


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the model knows of a device.

    ``bandwidth``: bytes/s of its memory. ``rates``: matrix operations/s by dtype. ``processors``; ``issue``: thread
    instructions/s of all of them. ``latency``: seconds until a load's data arrive. ``registers``, ``shared``: of a
    processor; ``gap``: seconds between the end of a kernel and the next one's work.
    """

    name: str
    bandwidth: float
    rates: Mapping[torch.dtype, float]
    processors: int
    issue: float
    latency: float
    registers: int = 65536
    shared: int = 227 * 1024
    warps: int = 64
    gap: float = 1.5e-6


# The vendor's 4.8 TB/s and 67 TFLOP/s (float32); 790 TFLOP/s is what large bfloat16 products of random numbers reach.
# Issue: four warps a cycle at 1.755 GHz. Latency and gap are usual figures, not the device's data sheet.
H200 = Device(
    name="H200", bandwidth=4.8e12, processors=132, issue=132 * 4 * 32 * 1.755e9, latency=0.7e-6,
    rates={torch.bfloat16: 790e12, torch.float16: 790e12, torch.float32: 67e12},
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel: what it moves, multiplies and issues; and, where its binary is known, how its grid fills the device.

    ``programs``: of the grid; ``resident``: that fit on one processor together; ``flight``: bytes that one has on their
    way at a time.
    """

    name: str
    bytes: float
    flops: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    instructions: float = 0.0
    programs: int | None = None
    resident: int = 1
    flight: float = 0.0

    def asked(self, device: Device) -> float:
        """The share of the bandwidth that enough loads are on their way for, by Little's law; at most 1."""
        if self.programs is None:
            return 1.0
        together = min(self.programs, self.resident * device.processors)
        return min(1.0, together * self.flight / (device.latency * device.bandwidth))

    def filled(self, device: Device) -> float:
        """The share of the processors that work, over all waves of the grid."""
        if self.programs is None:
            return 1.0
        wave = self.resident * device.processors
        if self.programs <= wave:
            return min(1.0, self.programs / device.processors)
        return self.programs / (math.ceil(self.programs / wave) * wave)

    def limits(self, device: Device) -> dict[str, float]:
        """Seconds by each of what can limit it."""
        filled = self.filled(device)
        return {
            "memory": self.bytes / device.bandwidth / min(self.asked(device), filled),
            "matrix units": self.flops / device.rates[self.dtype] / filled,
            "instructions": self.instructions / device.issue / filled,
        }

    def seconds(self, device: Device) -> float:
        """The largest of the limits, and the gap to the next kernel."""
        return max(self.limits(device).values()) + device.gap

    def limit(self, device: Device) -> str:
        """What limits it."""
        limits = self.limits(device)
        return max(limits, key=limits.__getitem__)


@dataclass
class Counted(TorchDispatchMode):
    """Notes every operation that touches memory as one kernel: it reads its inputs and writes its outputs once."""

    launches: list[Launch] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_flatten((args, kwargs or {}))[0] if isinstance(t, Tensor)]
        made = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in given}
        fresh = [t for t in made if t.untyped_storage()._cdata not in known]
        writes = bool(fresh) or func._schema.is_mutable
        empty = func._schema.name.split("::")[1] in ("empty", "empty_like", "empty_strided", "new_empty", "detach")
        if not (writes and (given or made)) or empty:
            return out
        # Of an embedding table and its like only the rows looked up are read.
        reads = [t for t in given if "embedding" not in func._schema.name or t.dtype == torch.int64]
        moved = sum(_bytes(t) for t in reads) + sum(_bytes(t) for t in made)
        count = flop_registry.get(func._overloadpacket)
        flops = 0 if count is None else count(*args, **(kwargs or {}), out_val=out)
        dtype = next((t.dtype for t in given if t.dtype.is_floating_point), torch.float32)
        self.launches.append(Launch(name=func._schema.name, bytes=moved, flops=flops, dtype=dtype))
        return out


def _bytes(t: Tensor) -> int:
    """Of what a tensor shows; an expanded dimension is read once."""
    sizes = [size for size, stride in zip(t.shape, t.stride(), strict=True) if stride or size == 0]
    return math.prod(sizes) * t.element_size()


def counted(model: nn.Module, loss: Callable[[], Tensor]) -> list[Launch]:
    """Every kernel of forward and backward, by torch's own operations on CUDA, without computing any."""
    parameters, buffers = stand_ins(model)
    with standing_in(model, {**parameters, **buffers}), CudaKernels(), Counted() as found:
        torch.autograd.backward(loss())
    return found.launches


def total(launches: Iterable[Launch], device: Device) -> dict[str, Any]:
    """Seconds of kernels one after another, their bytes, operations and number, and seconds by what limits them."""
    launches = list(launches)
    by: dict[str, float] = {}
    for one in launches:
        by[one.limit(device)] = by.get(one.limit(device), 0.0) + one.seconds(device)
    return {
        "seconds": sum(by.values()),
        "bytes": sum(one.bytes for one in launches),
        "flops": sum(one.flops for one in launches),
        "kernels": len(launches),
        "seconds_limited_by": by,
    }
