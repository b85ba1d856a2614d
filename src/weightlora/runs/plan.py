"""The memory planner: what a run would take, and what fits, from a model's config alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from weightlora.core import format_bytes, resolve_k
from weightlora.cost.estimate import Estimate, Phase, Setting, Traced
from weightlora.cost.tensors import Parts
from weightlora.errors import ConfigError, PlanError
from weightlora.runs.plan_config import PlanConfig, adapted, changes_of, flag, loss_of
from weightlora.tasks.skeletons import Skeleton


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """One phase with one micro-batch.

    ``lowest``: the name of the lowest live adapter's block. ``layers``, ``modules``: kept bytes by block and by module;
    what is saved outside every module is called "logits and loss".
    """

    name: str
    live: int
    lowest: str
    micro_batch: int
    accumulation: int
    trainable_params: int
    kept_activation_bytes: int
    parts: Parts
    layers: Mapping[str, int]
    modules: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return self.parts.total


@dataclass(frozen=True, kw_only=True)
class Row:
    """What K survivors cost: bytes and largest micro-batch with the deepest K, and with K that reach the lowest block.

    A micro-batch is None without a memory limit, and 0 where nothing fits.
    """

    k: int
    deepest: int
    dearest: int
    deepest_micro_batch: int | None
    dearest_micro_batch: int | None


@dataclass(frozen=True, kw_only=True)
class RankRow:
    """What a rank costs: bytes of warm-up and of the dearest final phase, and largest micro-batches, as in `Row`."""

    r: int
    warmup: int
    final: int
    warmup_micro_batch: int | None
    final_micro_batch: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The planner's answer; :meth:`to_json` for machines, :func:`weightlora.runs.plan_text.plan_text` for people.

    ``final`` is for the dearest K: whatever is selected, it fits. ``by_k``: what each K costs, at the final micro-batch
    of ``final``. ``by_r``: what ranks cost, at the phases' micro-batches.
    ``by_lowest``: bytes with K survivors of which the lowest lies in a block, in order of depth.
    """

    config: PlanConfig
    dtype: str
    n: int
    k: int
    memory: int | None
    warmup: PhasePlan
    final: PhasePlan
    by_k: tuple[Row, ...]
    by_r: tuple[RankRow, ...]
    by_lowest: tuple[tuple[str, int], ...]

    def to_json(self) -> str:
        """Everything, as strict JSON."""
        data = asdict(self)
        for name in ("warmup", "final"):
            data[name]["total"] = getattr(self, name).total
        return json.dumps(data, indent=1, allow_nan=False) + "\n"


Traces = dict[tuple[Any, ...], tuple[Skeleton, Traced]]


class Planner:
    """Traces a model once and answers questions about it.

    Args:
        config: what is planned.
        overhead: bytes that :func:`weightlora.runs.calibrate.calibrate` measured beyond the prediction.
        traces: of other planners, to be used again.
    """

    def __init__(self, config: PlanConfig, overhead: int = 0, traces: Traces | None = None) -> None:
        self.config, self.overhead, self.traces = config, overhead, {} if traces is None else traces
        key = tuple(getattr(config, name) for name in _TRACED)
        if key not in self.traces:
            self.traces[key] = _traced(config)
        self.bones, traced = self.traces[key]
        self.estimate = Estimate(
            traced,
            Setting(
                optimizer=config.optimizer,
                quantization=config.quantization,
                checkpointing=config.checkpointing,
                overhead=overhead,
            ),
        )
        self.n = self.estimate.n
        self.k = resolve_k(config.k, self.n)
        blocks = sorted(set(self.estimate.trace.blocks))
        self.lowest = blocks[0] if config.lowest is None else config.lowest
        if self.lowest not in blocks:
            raise ConfigError(f"lowest={self.lowest} is no block with a target; use {blocks[0]} to {blocks[-1]}")
        if config.checkpointing and not self.estimate.trace.units:
            raise ConfigError(f"{config.model} has no blocks that can be checkpointed; plan without checkpointing")

    def _ranks(self, r: int | None) -> dict[int, int]:
        r = r or self.config.r
        return {i: r for i, a in enumerate(self.estimate.trace.adapters) if a.rank != r}

    def warmup(self, r: int | None = None) -> Phase:
        """All n adapters, gated."""
        return Phase(
            name="warmup",
            live=tuple(range(self.n)),
            ranks=self._ranks(r),
            gated=self.config.gated,
            inputs=self.config.checkpointing,
        )

    def final(self, live: tuple[int, ...], r: int | None = None) -> Phase:
        """Survivors only; backward ends at the lowest."""
        whole = len(live) == self.n
        return Phase(name="final", live=live, ranks=self._ranks(r), inputs=self.config.checkpointing and whole)

    def phase_plan(self, phase: Phase, micro_batch: int) -> PhasePlan:
        """A phase with a micro-batch, as a record."""
        trace, estimate = self.estimate.at(micro_batch), self.estimate
        modules = trace.by_module(
            phase.live, ranks=phase.ranks, checkpointing=self.config.checkpointing, inputs=phase.inputs
        )
        return PhasePlan(
            name=phase.name,
            live=len(phase.live),
            lowest=self.block_name(min(trace.blocks[i] for i in phase.live)),
            micro_batch=micro_batch,
            accumulation=self.config.batch // micro_batch,
            trainable_params=estimate.trainable_params(phase),
            kept_activation_bytes=estimate.activations(phase, micro_batch),
            parts=estimate.parts(phase, micro_batch),
            layers=_by_layer(modules, trace.units),
            modules={module or _LOSS: size for module, size in modules.items() if size},
        )

    def block_name(self, block: int) -> str:
        """The module name of a block."""
        return self.estimate.trace.units[block] if block >= 0 else "outside the blocks"

    def plan(self, memory: int | None = None) -> Plan:
        """What the run takes, and what fits.

        Args:
            memory: bytes there are; each phase gets the largest micro-batch that fits. None: one example per pass.

        Raises:
            PlanError: not even one example fits; names the nearest setting that does.
        """
        estimate, batch = self.estimate, self.config.batch
        warmup = self.warmup()
        final = self.final(estimate.dearest(self.k, self.lowest))
        if memory is None:
            sizes: tuple[int, ...] = (batch, batch)
        else:
            try:
                sizes = estimate.micro_batches([warmup, final], memory, batch)
            except PlanError as error:
                raise PlanError(f"{error.args[0].split(';')[0]}; {self.nearest(memory)}") from None
        return Plan(
            config=self.config,
            dtype=str(self.bones.model.dtype).removeprefix("torch."),
            n=self.n,
            k=self.k,
            memory=memory,
            warmup=self.phase_plan(warmup, sizes[0]),
            final=self.phase_plan(final, sizes[1]),
            by_k=tuple(self.row(k, memory, sizes[1]) for k in _counts(self.n, self.k)),
            by_r=tuple(self.rank_row(r, memory, sizes) for r in _ranks(self.config.r)),
            by_lowest=tuple(
                (self.block_name(block), estimate.parts(self.final(estimate.dearest(self.k, block)), sizes[1]).total)
                for block in sorted(set(estimate.trace.blocks))
            ),
        )

    def row(self, k: int, memory: int | None, micro_batch: int) -> Row:
        """What K survivors cost."""
        sets = self.estimate.deepest(k), self.estimate.dearest(k, self.lowest)
        deepest, dearest = (self.final(live) for live in sets)
        return Row(
            k=k,
            deepest=self.estimate.parts(deepest, micro_batch).total,
            dearest=self.estimate.parts(dearest, micro_batch).total,
            deepest_micro_batch=self._largest(deepest, memory),
            dearest_micro_batch=self._largest(dearest, memory),
        )

    def rank_row(self, r: int, memory: int | None, micro_batches: Sequence[int]) -> RankRow:
        """What adapters of rank r cost."""
        warmup, final = self.warmup(r), self.final(self.estimate.dearest(self.k, self.lowest), r)
        return RankRow(
            r=r,
            warmup=self.estimate.parts(warmup, micro_batches[0]).total,
            final=self.estimate.parts(final, micro_batches[1]).total,
            warmup_micro_batch=self._largest(warmup, memory),
            final_micro_batch=self._largest(final, memory),
        )

    def _largest(self, phase: Phase, memory: int | None) -> int | None:
        return None if memory is None else self.estimate.largest_micro_batch(phase, memory, self.config.batch) or 0

    def nearest(self, memory: int) -> str:
        """In words: the setting nearest to this one with which one example fits."""
        for changes in changes_of(self.config, self.bones.model.dtype):
            other = Planner(replace(self.config, **changes), self.overhead, self.traces)
            needs = max(
                other.estimate.parts(phase, 1).total
                for phase in (other.warmup(), other.final(other.estimate.dearest(other.k, other.lowest)))
            )
            if needs <= memory:
                flags = " ".join(flag(name, value) for name, value in changes.items())
                return f"the nearest that fits is {flags} ({format_bytes(needs)})"
        return "nothing near it fits: take a smaller model, or more memory"


_LOSS = "logits and loss"
# What of a configuration decides a trace. The rank does not: it scales what it touches.
_TRACED = ("model", "head", "num_labels", "targets", "dtype", "autocast", "dropout", "length", "engine", "device")


def _traced(config: PlanConfig) -> tuple[Skeleton, Traced]:
    bones, model = adapted(config)
    traced = Traced.of(
        model,
        lambda size: loss_of(model, bones.batch(size, config.length), config.autocast),
        length=config.length,
        stock=config.engine == "stock",
        cuda=config.device == "cuda",
    )
    return bones, traced


def _counts(n: int, k: int) -> list[int]:
    """A handful of K from 1 to n, the one asked for among them."""
    ladder = {1, k, n} | {2**power for power in range(1, int(math.log2(n)) + 1)}
    return sorted(ladder)


def _ranks(r: int) -> list[int]:
    """A handful of ranks around the one asked for."""
    return sorted({max(1, r // 4), max(1, r // 2), r, 2 * r, 4 * r, 8 * r, 16 * r})


def _by_layer(modules: Mapping[str, int], units: tuple[str, ...]) -> dict[str, int]:
    """Bytes per block, and per module outside the blocks."""
    found: dict[str, int] = {}
    for module, size in modules.items():
        unit = next((u for u in units if module == u or module.startswith(f"{u}.")), None)
        name = unit or module or _LOSS
        if size:
            found[name] = found.get(name, 0) + size
    return found


__all__ = ["Plan", "PlanConfig", "Planner"]
