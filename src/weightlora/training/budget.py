"""What survivors may cost, counted before training: bytes of the whole run, or operations of a step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer

from weightlora.cost import (
    ActivationTrace,
    PlacementCosts,
    counting,
    operation_costs,
    placement_costs,
    reserved,
    step_cost,
    trace,
)
from weightlora.errors import BudgetError, ConfigError, ScheduleError
from weightlora.graft import (
    adapter_name,
    adapters,
    parameters,
)
from weightlora.graft.adapters import lora_layers, switched_off
from weightlora.methods import Budget, Method, Room
from weightlora.training.predict import checkpointing_of
from weightlora.training.trainer import first_batch, loss_of, own_code, split_batch
from weightlora.training.undisturbed import undisturbed

log = logging.getLogger("weightlora")

MOMENTS = 2  # AdamW's; an optimizer with less costs less than is counted
STEP_BYTES = 4  # its counter, of each tensor


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Micro-batch before and after the seam (None: as the trainer has it), and the method's budget, if it has one."""

    micro_batches: tuple[int | None, int | None]
    budget: Budget | None = None


def plan(
    trainer: Trainer, method: Method, micro_batches: tuple[int | None, int | None], *, stock: bool = False
) -> Plan:
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

    Raises:
        BudgetError: it cannot be met; the message names the smallest that can.
        ConfigError: the trainer makes its batches as it trains.
    """
    if method.limit is None:
        return Plan(micro_batches=micro_batches)
    kind, amount, _ = method.limit
    if (own_code(trainer) or "").endswith("._prepare_inputs"):
        raise ConfigError(
            f"{kind}= is counted on the run's batches before training, and {type(trainer).__name__} makes them as it"
            " trains; use k"
        )
    if kind == "step_time":
        return Plan(micro_batches=micro_batches, budget=_operations(trainer, method, amount))
    return _Memory(trainer, method, int(amount), stock).plan(micro_batches)


class RunBytes:
    """What lives at the end of a forward pass, counted for any set of adapters and any micro-batch, in bytes.

    Args:
        trainer: its model has all adapters, and nothing was trained.
        stock: adapters compute by PEFT's own forward.
    """

    def __init__(self, trainer: Trainer, *, stock: bool = False) -> None:
        self.trainer, self.stock = trainer, stock
        model: Any = trainer.model
        on, every = checkpointing_of(trainer)
        self.checkpointing = on and every == 1  # where only some blocks are checkpointed, all are counted in full
        self.name = adapter_name(model)
        self.pairs = [tuple(pair) for pair in parameters(model, self.name).values()]
        self.state = [_trained_bytes(pair) for pair in self.pairs]
        own = {id(p) for pair in self.pairs for p in pair}
        rest = [p for p in model.parameters() if id(p) not in own]
        # Weights, and what trains whichever adapters live: heads, with gradients and moments.
        self.fixed = _bytes([*rest, *model.buffers()])
        self.fixed += sum(_trained_bytes([p]) - _bytes([p]) for p in rest if p.requires_grad)
        args = trainer.args
        self.effective = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.rows = _widest_rows(trainer.train_dataset, self.effective)
        self._traces: dict[int, ActivationTrace] = {}

    def trace(self, size: int) -> ActivationTrace:
        """Of a micro-batch of `size` of the longest rows."""
        if size not in self._traces:
            trainer: Any = self.trainer
            collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
            # The longest rows, and last the shortest: a batch with padding keeps its mask, one without has none.
            rows = [self.rows[i % len(self.rows)] for i in range(size - 1)]
            with counting(), undisturbed(trainer):
                trainer.model.train()
                inputs = trainer._prepare_inputs(collate([*rows, self.rows[-1]] if rows else [self.rows[0]]))
                self._traces[size] = trace(
                    trainer.model, lambda: loss_of(trainer, inputs), name=self.name, stock=self.stock
                )
        return self._traces[size]

    def kept(self, live: Iterable[int], size: int, *, inputs: bool = False, checkpointing: bool | None = None) -> int:
        """What autograd keeps, and under checkpointing what the largest block computes anew."""
        checkpointing = self.checkpointing if checkpointing is None else checkpointing
        live, traced = list(live), self.trace(size)
        kept = traced.kept(live, checkpointing=checkpointing, inputs=inputs and checkpointing)
        return kept + (traced.recomputed(live) if checkpointing else 0)

    def total(self, live: Iterable[int], size: int) -> int:
        """Weights, adapters, gradients, AdamW's moments, and what is kept for backward."""
        live = list(live)
        return self.fixed + sum(self.state[i] for i in live) + self.kept(live, size)


class _Memory(RunBytes):
    """A run's plan within a limit."""

    def __init__(self, trainer: Trainer, method: Method, limit: int, stock: bool) -> None:
        super().__init__(trainer, stock=stock)
        self.method, self.limit = method, limit

    def plan(self, wanted: tuple[int | None, int | None]) -> Plan:
        per_device = self.trainer.args.per_device_train_batch_size
        for size in wanted:
            split_batch(self.trainer, size)
        first = wanted[0] or per_device
        warmup = next((size for size in self._sizes(first) if self.warmup(size) <= self.limit), None)
        if warmup is None:
            self._refuse()
        if warmup < first:
            log.info("warm-up fits with a micro-batch of %d in place of %d", warmup, first)
        rooms: list[Room] = []
        for size in self._sizes(wanted[1] or max(first, per_device)):
            rooms.append(Room(costs=self.costs(size), budget=self.limit, micro_batch=size))
            alone = [rooms[-1].costs.total([i]) for i in range(len(self.state))]
            if max(alone) <= self.limit:
                break  # something will fit here, whatever its importance
        if min(room.costs.total([i]) for room in rooms for i in range(len(self.state))) > self.limit:
            self._refuse()
        facts = {"warmup_micro_batch": warmup, "warmup_total": self.warmup(warmup)}
        return Plan(
            micro_batches=(warmup, rooms[0].micro_batch), budget=Budget(kind="memory", rooms=tuple(rooms), facts=facts)
        )

    def warmup(self, size: int, checkpointing: bool | None = None) -> int:
        """Bytes with all adapters alive: also the gates with their gradient, and copies that the method holds."""
        copies = getattr(self.method, "copies", 0) * sum(_bytes(pair) for pair in self.pairs)
        kept = self.kept(range(len(self.pairs)), size, inputs=True, checkpointing=checkpointing)
        return self.fixed + sum(self.state) + copies + kept + 8 * len(self.pairs)

    def costs(self, size: int) -> PlacementCosts:
        """Of placements after the seam."""
        traced = self.trace(size)
        costs = placement_costs(traced, self.state, base=self.fixed, checkpointing=self.checkpointing)
        return reserved(costs, [sum(p.numel() for p in pair) for pair in self.pairs]) if self.method.grows else costs

    def _sizes(self, most: int) -> list[int]:
        return [size for size in range(min(most, self.effective), 0, -1) if self.effective % size == 0]

    def _refuse(self) -> NoReturn:
        smallest = max(self.warmup(1), min(self.costs(1).total([i]) for i in range(len(self.state))))
        leaner = 0 if self.checkpointing else self.warmup(1, checkpointing=True)
        instead = (
            f", or {leaner} ({leaner / 2**20:.1f} MiB) with gradient_checkpointing" if 0 < leaner < smallest else ""
        )
        raise BudgetError(
            f"memory={self.method.limit and self.method.limit[2]} is too little: warm-up holds all {len(self.state)}"
            f" adapters and takes {_said(smallest)} at a micro-batch of 1{instead}; allow as"
            " much, or use fewer targets or a lower r",
            smallest=smallest,
        )


def _operations(trainer: Trainer, method: Method, share: float) -> Budget:
    """Operations of forward and backward, from one pass of the base that notes when gradients reach each layer."""
    model: Any = trainer.model
    name = adapter_name(model)
    layers: list[Any] = [layer for _, layer in lora_layers(model, name)]
    counter = FlopCounterMode(display=False)
    arrivals, tokens = [0] * len(layers), [0] * len(layers)

    def watch(index: int) -> Any:
        def arrived(_grad: Tensor) -> None:
            arrivals[index] = counter.get_total_flops()

        def see(_layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            tokens[index] += inputs[0].numel() // inputs[0].shape[-1]
            if output.requires_grad:
                output.register_hook(arrived)

        return see

    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    with counting(), undisturbed(trainer):
        model.train()
        inputs = trainer._prepare_inputs(first_batch(trainer))
        handles = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(layers)]
        handles += [table.register_forward_hook(lambda _m, _i, out: out.requires_grad_()) for table in tables]
        try:
            with switched_off(model, name), counter:
                loss_of(trainer, inputs).backward()
        finally:
            for handle in handles:
                handle.remove()
            model.zero_grad()
        whole = step_cost(model, lambda: loss_of(trainer, inputs)).flops
    if 0 in arrivals:
        raise ScheduleError("operations cannot be counted: no gradient reaches every adapter of this model; use memory")
    costs = operation_costs(adapters(model, name), arrivals, tokens)
    if method.grows:
        costs = reserved(costs, [a.rank * (a.d_in + a.d_out) for a in adapters(model, name)])
    limit = int(share * min(whole, costs.total(range(len(layers)))))
    smallest = min(costs.total([i]) for i in range(len(layers)))
    if smallest > limit:
        raise BudgetError(
            f"step_time={share:g}x is too little: the smallest placement takes {smallest / whole:.3f}x of a step with"
            " all adapters; allow as much",
            smallest=smallest,
        )
    return Budget(kind="step_time", rooms=(Room(costs=costs, budget=limit),), facts={"whole": whole, "share": share})


def _said(size: int) -> str:
    return f"{size} bytes ({size / 2**20:.1f} MiB)"


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _trained_bytes(tensors: Sequence[Tensor]) -> int:
    """Of trained parameters, their gradients and AdamW's state."""
    return (2 + MOMENTS) * _bytes(tensors) + STEP_BYTES * len(tensors)


def _widest_rows(data: Any, count: int) -> list[Mapping[str, Any]]:
    """The rows with the most tokens and the one with the least; the first ones of a set that does not know its rows."""
    names = getattr(data, "column_names", None)
    try:
        lengths = [len(ids) for ids in (data["input_ids"] if names else (row["input_ids"] for row in data))]
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        return [data[i] for i in [*order[:count], order[-1]]]
    except (KeyError, TypeError):
        return list(islice(iter(data), count))
