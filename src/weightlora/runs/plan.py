"""The memory planner: what a run would take, and what fits, from a model's config alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import peft
import torch
from torch import Tensor, nn

from weightlora.core import resolve_k
from weightlora.errors import ConfigError, PlanError
from weightlora.runs.build import match_targets
from weightlora.runs.estimate import Estimate, Phase, Setting, Traced
from weightlora.runs.memory import QUANTIZATIONS, Parts, check_names, format_size
from weightlora.tasks.skeletons import HEADS, Skeleton, skeleton

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TASK_TYPES = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM"}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is planned.

    Args:
        model: a name that :func:`weightlora.tasks.skeletons.skeleton` knows, a hub name, a folder, a config file.
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
        adapter_path: "auto", or "stock" for PEFT's own forward.
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
    adapter_path: str = "auto"
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
        choices = {"dtype": (None, *DTYPES), "head": (None, *HEADS), "device": ("cuda", "cpu")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(value for value in allowed if value)
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown; use {known}")
        check_names(optimizer=self.optimizer, quantization=self.quantization)


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """One phase with one micro-batch. ``lowest``: the name of the lowest live adapter's block."""

    name: str
    live: int
    lowest: str
    micro_batch: int
    accumulation: int
    trainable_params: int
    kept_activation_bytes: int
    parts: Parts
    layers: Mapping[str, int]

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
    of ``final``. ``by_r``: what ranks cost, at the phases' micro-batches. ``by_lowest``: bytes with K survivors of which the lowest lies in a block, in order of depth.
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
        for changes in _changes(self.config, self.bones.model.dtype):
            other = Planner(replace(self.config, **changes), self.overhead, self.traces)
            needs = max(
                other.estimate.parts(phase, 1).total
                for phase in (other.warmup(), other.final(other.estimate.dearest(other.k, other.lowest)))
            )
            if needs <= memory:
                flags = " ".join(_flag(name, value) for name, value in changes.items())
                return f"the nearest that fits is {flags} ({format_size(needs)})"
        return "nothing near it fits: take a smaller model, or more memory"


# What of a configuration decides a trace. The rank does not: it scales what it touches.
_TRACED = ("model", "head", "num_labels", "targets", "dtype", "autocast", "dropout", "length", "adapter_path", "device")


def _traced(config: PlanConfig) -> tuple[Skeleton, Traced]:
    bones, model = adapted(config)
    traced = Traced.of(
        model,
        lambda size: loss_of(model, bones.batch(size, config.length), config.autocast),
        length=config.length,
        stock=config.adapter_path == "stock",
        cuda=config.device == "cuda",
    )
    return bones, traced


def _changes(config: PlanConfig, dtype: torch.dtype) -> list[dict[str, Any]]:
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


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"no --{name}"
    return f"--{name} {value}"


def _counts(n: int, k: int) -> list[int]:
    """A handful of K from 1 to n, the one asked for among them."""
    ladder = {1, k, n} | {2**power for power in range(1, int(math.log2(n)) + 1)}
    return sorted(ladder)


def _ranks(r: int) -> list[int]:
    """A handful of ranks around the one asked for."""
    return sorted({max(1, r // 4), max(1, r // 2), r, 2 * r, 4 * r, 8 * r, 16 * r})


def _by_layer(modules: Mapping[str, int], units: tuple[str, ...]) -> dict[str, int]:
    """Bytes per block; what lies outside is called after its module's first name, the loss "logits and loss"."""
    found: dict[str, int] = {}
    for module, size in modules.items():
        unit = next((u for u in units if module == u or module.startswith(f"{u}.")), None)
        name = unit or (module if module else "logits and loss")
        if size:
            found[name] = found.get(name, 0) + size
    return found


def adapted(config: PlanConfig, device: str = "meta") -> tuple[Skeleton, nn.Module]:
    """The model of a plan with an adapter on each target.

    Raises:
        ConfigError, AdapterError: the model or its targets are not there.
    """
    bones = skeleton(
        config.model,
        dtype=DTYPES[config.dtype] if config.dtype else None,
        head=config.head,  # type: ignore[arg-type]  # checked by the configuration
        num_labels=config.num_labels,
        device=device,
    )
    lora = peft.LoraConfig(
        task_type=_TASK_TYPES[bones.head],
        r=config.r,
        lora_alpha=config.r,
        lora_dropout=config.dropout,
        target_modules=match_targets(config.targets, bones.linear_targets, bones.attention_targets),
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


__all__ = ["Plan", "PlanConfig", "Planner"]
