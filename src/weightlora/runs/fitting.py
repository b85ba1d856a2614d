"""What fits of one run: its own model, its own longest rows, before anything is trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightlora.core import resolve_k
from weightlora.errors import AdapterError
from weightlora.graft import adapters
from weightlora.methods import Policy
from weightlora.runs.build import Parts, training_arguments
from weightlora.runs.config import RunConfig
from weightlora.runs.estimate import Estimate, Phase, Setting, Traced
from weightlora.training.measure import isolated_rng


def estimate_run(parts: Parts, config: RunConfig) -> Estimate:
    """Trace a run's model on its longest training rows; nothing is computed, and the model is as it was.

    Raises:
        AdapterError: the method trains no plain LoRA adapters, or the model cannot be traced.
    """
    if not parts.method.uses_adapters:
        raise AdapterError(f"method {config.method!r} trains no plain LoRA adapters; nothing to plan")
    args: Any = training_arguments(config, Path("unused"))
    lengths = [len(row) for row in parts.train["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    model: Any = parts.model
    model.train()
    read = set(inspect.signature(parts.loaded.model.forward).parameters)  # the trainer drops other columns, too

    def loss(size: int) -> Callable[[], Tensor]:
        rows = [parts.train[order[i % len(order)]] for i in range(size)]
        rows = [{key: value for key, value in row.items() if key in read} for row in rows]
        batch = {key: value.to(model.device) for key, value in parts.prepared.collator(rows).items()}

        def run() -> Tensor:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(args.bf16)):
                found: Tensor = model(**batch).loss
                return found

        return run

    with isolated_rng():
        traced = Traced.of(model, loss, length=max(lengths), stock=config.engine in ("stock", "reference"))
    settings = args.gradient_checkpointing_kwargs or {}
    return Estimate(
        traced,
        Setting(
            optimizer=str(getattr(args.optim, "value", args.optim)),
            checkpointing=bool(args.gradient_checkpointing),
            every_n_layers=int(settings.get("every_n_layers", 1)),
        ),
    )


def run_phases(parts: Parts, config: RunConfig, estimate: Estimate, k: int | None = None) -> tuple[Phase, ...]:
    """Warm-up (where the method has one) and the final phase with the dearest K survivors.

    Args:
        k: how many survive; None: what the method says, or all where it chooses itself.
    """
    policy = parts.method.begin(adapters(parts.model), parts.max_steps)
    checkpointing, n = estimate.setting.checkpointing, estimate.n
    room = policy.allocate()
    ranks = {} if room is None else {i: rank for i, (rank, _) in enumerate(room)}
    whole = Phase(
        name="warmup" if policy.seam else "final",
        live=tuple(range(n)),
        ranks=ranks,
        gated=policy.gated,
        inputs=checkpointing,
    )
    if policy.seam is None:
        return (whole,)
    asked = getattr(parts.method, "k", None)
    count = k or (n if asked is None or parts.method.chooses_k else resolve_k(asked, n))
    live = estimate.dearest(count, min(estimate.trace.blocks))
    if type(policy).growth is not Policy.growth:
        ranks = dict.fromkeys(live, _grown_rank(estimate, live, getattr(parts.method, "max_rank", None)))
    final = Phase(name="final", live=live, ranks=ranks, inputs=checkpointing and count == n)
    return (whole, final) if policy.seam else (final,)


def _grown_rank(estimate: Estimate, live: Sequence[int], cap: int | None) -> int:
    """The common rank with which survivors spend what all adapters had."""
    every = estimate.trace.adapters
    spent = sum(a.rank * (a.d_in + a.d_out) for a in every)
    rank = spent // sum(every[i].d_in + every[i].d_out for i in live)
    return max(*(a.rank for a in every), rank if cap is None else min(rank, cap))


def largest_micro_batches(parts: Parts, config: RunConfig, memory: int, k: int | None = None) -> dict[str, int]:
    """``{phase: largest micro-batch that fits}``, each a divisor of the effective batch.

    Args:
        parts, config: of the run.
        memory: bytes there are, for everything.
        k: as :func:`run_phases`.

    Raises:
        PlanError: a phase does not fit with one example.
        AdapterError: as :func:`estimate_run`.
    """
    args = training_arguments(config, Path("unused"))
    estimate = estimate_run(parts, config)
    phases = run_phases(parts, config, estimate, k)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return dict(zip((p.name for p in phases), estimate.micro_batches(phases, memory, batch), strict=True))
