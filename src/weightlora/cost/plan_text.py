"""A plan in words and tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

from weightlora.core.sizes import format_bytes
from weightlora.cost.plan import OUTSIDE, KCost, Plan, RankCost

# Field of `PhaseCost`: how it is called.
_PARTS = {
    "weights": "weights, frozen",
    "adapters": "adapter parameters",
    "heads": "heads, trained",
    "gates": "gates",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations kept",
    "recomputed": "recomputed block",
    "workspace": "workspace (estimate)",
    "overhead": "overhead (measured)",
    "parallel": "beside, for the other devices (model)",
}


def plan_text(plan: Plan, layers: bool = False) -> str:
    """What the plan says, in lines of at most about a hundred characters; `layers`: also what each block keeps."""
    config, final = plan.config, plan.final
    first = plan.by_lowest[0][0] if config.lowest is None else final.lowest
    bits = [plan.dtype, *([config.quantization] if config.quantization else [])]
    bits += ["bf16 autocast"] if config.autocast else []
    bits += ["checkpointing"] if config.checkpointing else []
    lines = [
        f"{config.model}, {', '.join(bits)}, {config.optimizer}",
        f"{plan.n} adapters of rank {config.r} ({config.targets})",
        f"{config.batch} examples of {config.length} tokens per optimizer step, kernels of {config.device}"
        + (f", {format_bytes(plan.memory)} of memory" if plan.memory else ""),
        *([f"{config.devices} devices, {config.sharding}; all figures per device"] if config.devices > 1 else []),
        "",
        *_table(_phase_rows(plan)),
        "",
        f"What each K costs with {_examples(final.micro_batch)} per forward pass"
        + (", and the largest micro-batch that fits" if plan.memory else ""),
        *_table(_cost_rows(plan, plan.by_k, ("K", "the deepest K", f"down to {first}"), ("deepest", "lowest"))),
        "",
        f"What each rank costs, with all {plan.n} and with {plan.k} of them",
        *_table(_cost_rows(plan, plan.by_r, ("r", "warm-up", "final"), ("warm-up", "final"))),
        "",
        f"What the lowest of {plan.k} survivors costs: nothing below it keeps anything",
        *_table([("lowest in", "total"), *((name, format_bytes(size)) for name, size in plan.by_lowest)]),
    ]
    if layers:
        lines += ["", "What each block keeps for backward", *_table(_layer_rows(plan))]
    return "\n".join(lines) + "\n"


def _layer_rows(plan: Plan) -> list[tuple[str, ...]]:
    phases = plan.warmup, plan.final
    names = list(dict.fromkeys([*plan.warmup.layers, *plan.final.layers]))
    return [
        ("", "warm-up", "final"),
        *((name, *(format_bytes(phase.layers.get(name, 0)) for phase in phases)) for name in names),
    ]


def _examples(count: int) -> str:
    return f"{count} example" + ("s" if count > 1 else "")


def _phase_rows(plan: Plan) -> list[tuple[str, ...]]:
    phases = plan.warmup, plan.final
    rows: list[tuple[str, ...]] = [
        ("", f"warm-up: all {plan.n}", f"final: {plan.k} of {plan.n}, worst case"),
        ("lowest adapter in", *(phase.lowest for phase in phases)),
        ("micro-batch x accumulation", *(f"{phase.micro_batch} x {phase.accumulation}" for phase in phases)),
        ("trained numbers", *(f"{phase.trainable_params:,}" for phase in phases)),
    ]
    for field, name in _PARTS.items():
        sizes = [int(getattr(phase.parts, field)) for phase in phases]
        if any(sizes):
            rows.append((name, *(format_bytes(size) for size in sizes)))
        if field == "activations":
            last = [phase.layers.get(OUTSIDE, 0) for phase in phases]
            rows.append(("  of that logits and loss", *(format_bytes(size) for size in last)))
    rows.append(("total", *(format_bytes(phase.total) for phase in phases)))
    if plan.config.devices > 1:
        rows.append(("sent per step (model)", *(format_bytes(phase.traffic.total) for phase in phases)))
        rows.append(("  of that parameters", *(format_bytes(phase.traffic.gathered) for phase in phases)))
        counts = [phase.traffic.gathers + phase.traffic.reductions for phase in phases]
        rows.append(("  in so many collectives", *(f"{count:,}" for count in counts)))
    return rows


def _cost_rows(
    plan: Plan, costs: Sequence[KCost | RankCost], head: tuple[str, ...], fits: tuple[str, ...]
) -> list[tuple[str, ...]]:
    """One line per K or rank: two totals, and with a limit of memory the two micro-batches that fit."""
    rows = [head if plan.memory is None else (*head, *(f"micro-batch, {which}" for which in fits))]
    for cost in costs:
        number, low, high, *sizes = astuple(cost)
        line = (str(number), format_bytes(low), format_bytes(high))
        rows.append(line if plan.memory is None else (*line, *(str(size or "none") for size in sizes)))
    return rows


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
