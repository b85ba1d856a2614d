"""The memory planner: what a run would take, and what fits, from a model's config alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from weightlora.core.budget import resolve_k
from weightlora.core.sizes import format_bytes
from weightlora.cost.estimate import Estimate, Phase, PhaseCost, Setting, Traced
from weightlora.cost.parallel import Parallel, Traffic
from weightlora.cost.plan_spec import PlanConfig
from weightlora.cost.tensors import QUANTIZATIONS
from weightlora.errors import ConfigError, PlanError
from weightlora.graft.adapters import base_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTSIDE = "logits and loss"
# What of a configuration decides a trace. The rank does not: it scales what it touches.
_TRACED = ("model", "head", "num_labels", "targets", "dtype", "autocast", "dropout", "length", "engine", "device")
Traces = dict[tuple[object, ...], Traced]


@dataclass(frozen=True, kw_only=True)
class PlannedPhase:
    """One phase with one micro-batch.

    ``lowest``: the name of the lowest live adapter's block. ``layers``, ``modules``: kept bytes by block and by module;
    what is saved outside every module is called "logits and loss". ``traffic``: what each device sends per optimizer
    step.
    """

    name: str
    live: int
    lowest: str
    micro_batch: int
    accumulation: int
    trainable_params: int
    kept_activation_bytes: int
    parts: PhaseCost
    traffic: Traffic
    layers: Mapping[str, int]
    modules: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return self.parts.total


@dataclass(frozen=True, kw_only=True)
class KCost:
    """What K survivors cost: bytes and largest micro-batch with the deepest K, and with K that reach the lowest block.

    A micro-batch is None without a memory limit, and 0 where nothing fits.
    """

    k: int
    deepest: int
    dearest: int
    deepest_micro_batch: int | None
    dearest_micro_batch: int | None


@dataclass(frozen=True, kw_only=True)
class RankCost:
    """What a rank costs: bytes of warm-up and of the dearest final phase, and largest micro-batches, as in `KCost`."""

    r: int
    warmup: int
    final: int
    warmup_micro_batch: int | None
    final_micro_batch: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The planner's answer; :meth:`to_json` for machines, :func:`weightlora.cost.plan_text.plan_text` for people.

    ``final`` is for the dearest K: whatever is selected, it fits. ``by_k``: what each K costs, at the final micro-batch
    of ``final``. ``by_r``: what ranks cost, at the phases' micro-batches.
    ``by_lowest``: bytes with K survivors of which the lowest lies in a block, in order of depth.
    """

    config: PlanConfig
    dtype: str
    n: int
    k: int
    memory: int | None
    warmup: PlannedPhase
    final: PlannedPhase
    by_k: tuple[KCost, ...]
    by_r: tuple[RankCost, ...]
    by_lowest: tuple[tuple[str, int], ...]

    def to_json(self) -> str:
        """Everything, as strict JSON."""
        data = asdict(self)
        for name in ("warmup", "final"):
            data[name]["total"] = getattr(self, name).total
        return json.dumps(data, indent=1, allow_nan=False) + "\n"


class Planner:
    """Trace a model once and answer questions about it.

    Args:
        config: what is planned.
        traced: builds the model of a configuration, with an adapter on each target, and traces it.
        overhead: bytes that a probe measured beyond the prediction.
        traces: of other planners, to be used again.
    """

    def __init__(
        self,
        config: PlanConfig,
        traced: Callable[[PlanConfig], Traced],
        overhead: int = 0,
        traces: Traces | None = None,
    ) -> None:
        self.config, self.traced, self.overhead = config, traced, overhead
        self.traces = {} if traces is None else traces
        key = tuple(getattr(config, name) for name in _TRACED)
        if key not in self.traces:
            self.traces[key] = traced(config)
        found = self.traces[key]
        self.trace, self.dtype = found.trace, cast("PreTrainedModel", base_of(found.model)).dtype
        setting = Setting(
            optimizer=config.optimizer,
            quantization=config.quantization,
            checkpointing=config.checkpointing,
            overhead=overhead,
            parallel=Parallel(devices=config.devices, sharding=config.sharding),
        )
        self.estimate = Estimate(found.model, found.at, setting)
        self.n = self.estimate.n
        self.k = resolve_k(config.k, self.n)
        self.blocks = sorted(set(self.trace.blocks))
        self.lowest = self.blocks[0] if config.lowest is None else config.lowest
        if self.lowest not in self.blocks:
            raise ConfigError(
                f"lowest={self.lowest} is not a block with adapters; use {self.blocks[0]} to {self.blocks[-1]}"
            )
        idle = [a.name for a in self.trace.adapters if not self.trace.pieces(a.index)]
        if idle:
            raise PlanError(
                f"{len(idle)} adapters compute nothing on the text that a plan is made for ({idle[0]}, ...), such as"
                " those on an image encoder; leave them out of targets"
            )
        if config.checkpointing and not self.trace.units:
            raise ConfigError(f"{config.model} has no blocks that can be checkpointed; plan without checkpointing")

    def warmup(self, r: int | None = None) -> Phase:
        """All n adapters, gated."""
        return self._phase("warmup", tuple(range(self.n)), r, gated=self.config.gated)

    def final(self, live: tuple[int, ...] | None = None, r: int | None = None) -> Phase:
        """Survivors only (default: the dearest K); backward ends at the lowest."""
        return self._phase("final", self.trace.dearest(self.k, self.lowest) if live is None else live, r)

    def _phase(self, name: str, live: tuple[int, ...], r: int | None, gated: bool = False) -> Phase:
        r = r or self.config.r
        ranks = {i: r for i, a in enumerate(self.trace.adapters) if a.rank != r}
        inputs = self.config.checkpointing and len(live) == self.n
        return Phase(name=name, live=live, ranks=ranks, gated=gated, inputs=inputs)

    def planned(self, phase: Phase, micro_batch: int) -> PlannedPhase:
        """A phase with a micro-batch, as a record."""
        trace, estimate = self.estimate.at(micro_batch), self.estimate
        modules = trace.by_module(
            phase.live, ranks=phase.ranks, checkpointing=self.config.checkpointing, inputs=phase.inputs
        )
        return PlannedPhase(
            name=phase.name,
            live=len(phase.live),
            lowest=self.block_name(min(trace.blocks[i] for i in phase.live)),
            micro_batch=micro_batch,
            accumulation=self.config.batch // micro_batch,
            trainable_params=estimate.trainable_params(phase),
            kept_activation_bytes=estimate.activations(phase, micro_batch),
            parts=estimate.cost(phase, micro_batch),
            traffic=estimate.traffic(phase, self.config.batch // micro_batch),
            layers=_by_layer(modules, trace.units),
            modules={module or OUTSIDE: size for module, size in modules.items() if size},
        )

    def block_name(self, block: int) -> str:
        """The module name of a block."""
        return self.trace.units[block] if block >= 0 else "outside the blocks"

    def plan(self, memory: int | None = None) -> Plan:
        """What the run takes, and what fits.

        Args:
            memory: bytes there are; each phase gets the largest micro-batch that fits. None: one example per pass.

        Raises:
            PlanError: not even one example fits; names the nearest setting that does.
        """
        warmup, final = self.warmup(), self.final()
        first, last = (self._micro_batch(phase, memory) for phase in (warmup, final))
        counts = {1, self.k, self.n, *(2**power for power in range(1, self.n.bit_length()))}
        ranks = {max(1, self.config.r // 4), max(1, self.config.r // 2), *(self.config.r << i for i in range(5))}
        return Plan(
            config=self.config,
            dtype=str(self.dtype).removeprefix("torch."),
            n=self.n,
            k=self.k,
            memory=memory,
            warmup=self.planned(warmup, first),
            final=self.planned(final, last),
            by_k=tuple(self._k_cost(k, memory, last) for k in sorted(counts)),
            by_r=tuple(self._rank_cost(r, memory, first, last) for r in sorted(ranks)),
            by_lowest=tuple(
                (self.block_name(block), self._total(self.final(self.trace.dearest(self.k, block)), last))
                for block in self.blocks
            ),
        )

    def _micro_batch(self, phase: Phase, memory: int | None) -> int:
        found = self.config.batch if memory is None else self._largest(phase, memory)
        if memory is not None and not found:
            raise PlanError(
                f"phase {phase.name!r} needs {format_bytes(self._total(phase, 1))} with one example per forward pass"
                f" and {len(phase.live)} adapters, more than the {format_bytes(memory)} given; {self.nearest(memory)}"
            )
        return found or 0

    def _k_cost(self, k: int, memory: int | None, micro_batch: int) -> KCost:
        deepest, dearest = self.final(self.trace.deepest(k)), self.final(self.trace.dearest(k, self.lowest))
        return KCost(
            k=k,
            deepest=self._total(deepest, micro_batch),
            dearest=self._total(dearest, micro_batch),
            deepest_micro_batch=self._largest(deepest, memory),
            dearest_micro_batch=self._largest(dearest, memory),
        )

    def _rank_cost(self, r: int, memory: int | None, first: int, last: int) -> RankCost:
        warmup, final = self.warmup(r), self.final(r=r)
        return RankCost(
            r=r,
            warmup=self._total(warmup, first),
            final=self._total(final, last),
            warmup_micro_batch=self._largest(warmup, memory),
            final_micro_batch=self._largest(final, memory),
        )

    def _total(self, phase: Phase, micro_batch: int) -> int:
        return self.estimate.cost(phase, micro_batch).total

    def _largest(self, phase: Phase, memory: int | None) -> int | None:
        return None if memory is None else self.estimate.largest_micro_batch(phase, memory, self.config.batch) or 0

    def nearest(self, memory: int) -> str:
        """In words: the setting nearest to this one with which one example fits."""
        for changes in _changes_of(self.config, self.dtype):
            other = Planner(replace(self.config, **changes), self.traced, self.overhead, self.traces)
            needs = max(other._total(phase, 1) for phase in (other.warmup(), other.final()))
            if needs <= memory:
                flags = " ".join(_flag(name, value) for name, value in changes.items())
                return f"the nearest that fits is {flags} ({format_bytes(needs)})"
        return "nothing near it fits: take a smaller model, or more memory"


def _by_layer(modules: Mapping[str, int], units: tuple[str, ...]) -> dict[str, int]:
    """Bytes per block, and per module outside the blocks."""
    found: dict[str, int] = {}
    for module, size in modules.items():
        unit = next((u for u in units if module == u or module.startswith(f"{u}.")), None)
        name = unit or module or OUTSIDE
        if size:
            found[name] = found.get(name, 0) + size
    return found


def _changes_of(config: PlanConfig, dtype: torch.dtype) -> list[dict[str, Any]]:
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


def _flag(name: str, value: object) -> str:
    """A change as it is written on the command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"no --{name}"
    return f"--{name} {value}"
