"""What survivors may cost, counted before training: bytes of the run or of its backward, operations of a step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from transformers import Trainer

from weightlora.cost import ActivationTrace, Estimate, Phase, Setting, counting, divisors, operations, step_cost, trace
from weightlora.errors import BudgetError, ConfigError, WeightLoRAError
from weightlora.methods import Budget, Limit, Method, Room
from weightlora.training.inside import Inside, model_of
from weightlora.training.predict import checkpointing_of
from weightlora.training.trainer import first_loss, loss_of, own_code, split_batch
from weightlora.training.undisturbed import undisturbed

log = logging.getLogger("weightlora")

MicroBatches = tuple[int | None, int | None]


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """Micro-batch before and after the seam (None: as the trainer has it), and the method's budget, if it has one."""

    micro_batches: MicroBatches
    budget: Budget | None = None


def allow(
    trainer: Trainer, method: Method, micro_batches: MicroBatches, *, stock: bool = False, sharded: bool = False
) -> Allowed:
    """Count what the method's limit needs, on the model as it is: with all adapters, before any step.

    Memory is everything that lives at the end of a forward pass: weights, adapters, gradients, AdamW's moments and what
    is kept for backward, on a micro-batch of the longest rows. Warm-up has to fit too, with all adapters: its
    micro-batch is made smaller until it does. After the seam the wanted micro-batch comes first, and smaller ones only
    where nothing fits.

    Args:
        trainer: as it was handed to ``fit``.
        method: whose limit counts.
        micro_batches: what the user wants, before and after the seam.
        stock: adapters compute by PEFT's own forward.
        sharded: the base will be sharded over processes.

    Raises:
        BudgetError: it cannot be met; the message names the smallest that can.
        ConfigError: the trainer makes its batches as it trains.
    """
    limit = method.needs.limit
    if limit is None or (limit.assumed and sharded):
        return Allowed(micro_batches=micro_batches)
    try:
        return _counted(trainer, method, limit, micro_batches, stock)
    except WeightLoRAError as error:
        if not limit.assumed:
            raise
        log.info("survivors are a share of the adapters, not of what backward keeps, which is not counted: %s", error)
        return Allowed(micro_batches=micro_batches)


def _counted(trainer: Trainer, method: Method, limit: Limit, micro_batches: MicroBatches, stock: bool) -> Allowed:
    """:func:`allow` for a method that has a limit."""
    kind = limit.kind
    if (own_code(trainer) or "").endswith("._prepare_inputs"):
        raise ConfigError(
            f"{kind}= has to be counted on batches before training, and {type(trainer).__name__} makes its batches"
            " during training; use k"
        )
    if kind == "step_time":
        return Allowed(micro_batches=micro_batches, budget=_within_operations(trainer, method, limit.amount))
    if kind == "kept":
        return _within_kept(trainer, method, limit.amount, micro_batches, stock)
    return _within_memory(trainer, method, int(limit.amount), micro_batches, stock)


def estimate_of(trainer: Trainer, *, stock: bool = False) -> Estimate:
    """An estimate on micro-batches of the trainer's longest rows, as AdamW would train them.

    Args:
        trainer: its model has all adapters, and nothing was trained.
        stock: adapters compute by PEFT's own forward.
    """
    on, every = checkpointing_of(trainer)
    model, inside = model_of(trainer), Inside(trainer)
    longest = longest_rows(trainer)

    def trace_of(size: int) -> ActivationTrace:
        collate = inside.collator()
        # The longest rows, and last the shortest: a batch with padding keeps its mask, one without has none.
        rows = [longest[i % len(longest)] for i in range(size - 1)]
        with counting(), undisturbed(trainer):
            model.train()
            inputs = inside.prepared(collate([*rows, longest[-1]] if rows else [longest[0]]))
            return trace(model, lambda: loss_of(trainer, inputs), stock=stock)

    # Where only some blocks are checkpointed, all are counted in full.
    return Estimate(model, trace_of, Setting(checkpointing=on and every == 1))


def longest_rows(trainer: Trainer) -> list[Mapping[str, Any]]:
    """An effective batch of the rows with the most tokens, and the one with the least; the first ones of a set that
    does not know its rows."""
    data: Any = trainer.train_dataset
    count = _effective(trainer)
    names = getattr(data, "column_names", None)
    try:
        lengths = [len(ids) for ids in (data["input_ids"] if names else (row["input_ids"] for row in data))]
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        return [data[i] for i in [*order[:count], order[-1]]]
    except (KeyError, TypeError):
        return list(islice(iter(data), count))


def _effective(trainer: Trainer) -> int:
    return trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps


def _within_memory(trainer: Trainer, method: Method, limit: int, wanted: MicroBatches, stock: bool) -> Allowed:
    estimate, per_device = estimate_of(trainer, stock=stock), trainer.args.per_device_train_batch_size
    every, copies = tuple(range(estimate.n)), method.needs.copies
    warmup = Phase(name="warmup", live=every, gated=True, inputs=estimate.setting.checkpointing, copies=copies)
    for size in wanted:
        split_batch(trainer, size)

    def sizes(most: int) -> list[int]:
        return [size for size in divisors(_effective(trainer))[::-1] if size <= most]

    first = wanted[0] or per_device
    fitting = (size for size in sizes(first) if estimate.cost(warmup, size).held <= limit)
    begin = next(fitting, None)
    if begin is None:
        raise _too_little(estimate, warmup, method)
    if begin < first:
        log.info("warm-up fits with a micro-batch of %d in place of %d", begin, first)
    rooms: list[Room] = []
    for size in sizes(wanted[1] or max(first, per_device)):
        costs = estimate.placements(size, grows=method.needs.grows)
        rooms.append(Room(costs=costs, budget=limit, micro_batch=size))
        if max(costs.total([i]) for i in every) <= limit:
            break  # something will fit here, whatever its importance
    if min(room.costs.total([i]) for room in rooms for i in every) > limit:
        raise _too_little(estimate, warmup, method)
    facts = {"warmup_micro_batch": begin, "warmup_total": estimate.cost(warmup, begin).held}
    budget = Budget(kind="memory", rooms=tuple(rooms), facts=facts)
    return Allowed(micro_batches=(begin, rooms[0].micro_batch), budget=budget)


def _within_kept(trainer: Trainer, method: Method, share: float, wanted: MicroBatches, stock: bool) -> Allowed:
    """What backward keeps after the seam, as a share of what it keeps with all adapters; warm-up within the same."""
    estimate, per_device = estimate_of(trainer, stock=stock), trainer.args.per_device_train_batch_size
    every = Phase(name="warmup", live=tuple(range(estimate.n)), inputs=estimate.setting.checkpointing)
    for size in wanted:
        split_batch(trainer, size)
    after = wanted[1] or max(wanted[0] or 0, per_device)
    whole, costs = estimate.activations(every, after), estimate.kept_placements(after, grows=method.needs.grows)
    limit, smallest = int(share * whole), min(costs.total([i]) for i in every.live)
    if smallest > limit:
        raise BudgetError(
            f"kept={share:g}x is too little: the smallest placement keeps {smallest / whole:.3f}x of what all adapters"
            " keep; allow as much",
            smallest=smallest,
        )
    sizes = [size for size in divisors(_effective(trainer))[::-1] if size <= after]
    begin = wanted[0] or next((size for size in sizes if estimate.activations(every, size) <= limit), sizes[-1])
    facts = {
        "whole": whole,
        "share": share,
        "warmup_micro_batch": begin,
        "warmup_total": estimate.activations(every, begin),
    }
    budget = Budget(kind="kept", rooms=(Room(costs=costs, budget=limit, micro_batch=after),), facts=facts)
    return Allowed(micro_batches=(begin, after), budget=budget)


def _too_little(estimate: Estimate, warmup: Phase, method: Method) -> BudgetError:
    costs = estimate.placements(1, grows=method.needs.grows)
    smallest = max(estimate.cost(warmup, 1).held, min(costs.total([i]) for i in warmup.live))
    instead = ""
    if not estimate.setting.checkpointing:
        leaner = estimate.under(checkpointing=True).cost(replace(warmup, inputs=True), 1).held
        if leaner < smallest:
            instead = f", or {leaner} ({leaner / 2**20:.1f} MiB) with gradient_checkpointing"
    said = "" if method.needs.limit is None else method.needs.limit.said
    return BudgetError(
        f"memory={said} is too little: warm-up holds all {estimate.n} adapters and takes"
        f" {smallest} bytes ({smallest / 2**20:.1f} MiB) at a micro-batch of 1{instead}; allow as much, or use fewer"
        " targets or a lower r",
        smallest=smallest,
    )


def _within_operations(trainer: Trainer, method: Method, share: float) -> Budget:
    """Operations of forward and backward of the first micro-batch, as a share of those with all adapters."""
    model = model_of(trainer)
    with first_loss(trainer) as loss:
        assert loss is not None
        costs, whole = operations(model, loss, grows=method.needs.grows), step_cost(model, loss).flops
    n = len(costs.own)
    limit = int(share * min(whole, costs.total(range(n))))
    smallest = min(costs.total([i]) for i in range(n))
    if smallest > limit:
        raise BudgetError(
            f"step_time={share:g}x is too little: the smallest placement takes {smallest / whole:.3f}x of a step with"
            " all adapters; allow as much",
            smallest=smallest,
        )
    return Budget(kind="step_time", rooms=(Room(costs=costs, budget=limit),), facts={"whole": whole, "share": share})
