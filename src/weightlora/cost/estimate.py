"""What one phase of training takes, for any set of live adapters, rank and micro-batch, from one traced forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from weightlora.core import format_bytes
from weightlora.cost.activations import ActivationTrace
from weightlora.cost.tensors import (
    Parts,
    optimizer_bytes,
    shapes_of,
    tensor_bytes,
    trained,
    weight_bytes,
)
from weightlora.cost.tracing import trace
from weightlora.errors import PlanError

# Batch sizes to trace with: what is a multiple of such a number must come from the batch.
_PRIMES = (11, 13, 17, 19, 23, 29, 31)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training in which no tensor changes shape, as the planner sees it.

    ``live``: indices of live adapters. ``ranks``: of those whose rank is not the model's. ``gated``: omega trains.
    ``inputs``: the embeddings' outputs require a gradient, as checkpointing makes them until the seam.
    """

    name: str
    live: tuple[int, ...]
    ranks: Mapping[int, int] = field(default_factory=dict)
    gated: bool = False
    inputs: bool = False


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What can be changed without tracing again.

    ``optimizer``, ``momentum``, ``quantization``: as in :mod:`weightlora.cost.tensors`. ``checkpointing``: blocks are
    computed anew in backward; ``every_n_layers``: only every so many-th. ``overhead``: bytes that a probe measured
    beyond the prediction.
    """

    optimizer: str = "adamw_torch"
    momentum: bool = False
    quantization: str | None = None
    checkpointing: bool = False
    every_n_layers: int = 1
    overhead: int = 0


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A model with what its forward keeps for a batch of `batch` rows."""

    model: nn.Module
    trace: ActivationTrace
    batch: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        loss: Callable[[int], Callable[[], Tensor]],
        *,
        length: int,
        stock: bool = False,
        cuda: bool = False,
    ) -> Traced:
        """Trace a model once, for any batch size.

        Args:
            model: with every adapter live; on the meta device or with weights.
            loss: the forward pass of a batch of a given size.
            length: tokens of a row (so that the traced batch size divides nothing else).
            stock, cuda: as :func:`weightlora.cost.trace`.
        """
        batch = _prime(model, length)
        return cls(model=model, trace=trace(model, loss(batch), stock=stock, cuda=cuda), batch=batch)


class Estimate:
    """Closed form over a trace."""

    def __init__(self, traced: Traced, setting: Setting) -> None:
        model = traced.model
        self.traced, self.trace, self.setting = traced, traced.trace, setting
        self.weights = weight_bytes(model, setting.quantization)
        self.adapter_width = next(p.element_size() for p in trained(model)[0])
        heads = trained(model)[1]
        self.heads, self.head_shapes = tensor_bytes(heads), shapes_of(heads)
        self.head_params = sum(p.numel() for p in heads)
        # A quantised weight is multiplied in full precision, one at a time.
        full = [m.weight.numel() * m.weight.element_size() for m in model.modules() if isinstance(m, nn.Linear)]
        self.dequantised = 0 if setting.quantization is None else max(full)
        self.pieces = [self.trace.pieces(i) for i in self.trace.every]
        self._at: dict[int, ActivationTrace] = {}

    @property
    def n(self) -> int:
        """The number of adapters."""
        return len(self.trace.adapters)

    def at(self, micro_batch: int) -> ActivationTrace:
        """The trace for a micro-batch."""
        if micro_batch not in self._at:
            self._at[micro_batch] = self.trace.at(micro_batch, self.traced.batch)
        return self._at[micro_batch]

    def adapter_shapes(self, live: Sequence[int], ranks: Mapping[int, int]) -> list[tuple[tuple[int, ...], int]]:
        """``(shape, bytes per number)`` of the factors of live adapters."""
        found: list[tuple[tuple[int, ...], int]] = []
        for i in live:
            adapter = self.trace.adapters[i]
            rank = ranks.get(i, adapter.rank)
            found += [((rank, adapter.d_in), self.adapter_width), ((adapter.d_out, rank), self.adapter_width)]
        return found

    def trainable_params(self, phase: Phase) -> int:
        """Numbers that train: adapters, heads, gates."""
        adapters = sum(math.prod(shape) for shape, _ in self.adapter_shapes(phase.live, phase.ranks))
        return adapters + self.head_params + (len(phase.live) if phase.gated else 0)

    def activations(self, phase: Phase, micro_batch: int) -> int:
        """Bytes kept between forward and backward, omega among them."""
        kept = self.at(micro_batch).kept(
            phase.live,
            ranks=phase.ranks,
            checkpointing=self.setting.checkpointing,
            every_n_layers=self.setting.every_n_layers,
            inputs=phase.inputs,
        )
        return kept + (4 * self.n if phase.gated else 0)

    def parts(self, phase: Phase, micro_batch: int) -> Parts:
        """Where the bytes of a phase go."""
        at, shapes = self.at(micro_batch), self.adapter_shapes(phase.live, phase.ranks)
        adapters = sum(math.prod(shape) * width for shape, width in shapes)
        gates = 4 * self.n if phase.gated else 0
        options: dict[str, Any] = {"ranks": phase.ranks, "every_n_layers": self.setting.every_n_layers}
        return Parts(
            weights=self.weights,
            adapters=adapters,
            heads=self.heads,
            gates=2 * gates,
            gradients=adapters + self.heads,
            optimizer=self._optimizer([*shapes, *self.head_shapes]),
            activations=self.activations(phase, micro_batch) - gates,
            recomputed=at.recomputed(phase.live, **options) if self.setting.checkpointing else 0,
            workspace=at.largest(phase.live) + self.dequantised,
            overhead=self.setting.overhead,
        )

    def state(self, rank: int | None = None) -> list[int]:
        """(n,) bytes of each adapter's parameters, gradients and optimizer state."""
        found = []
        for i in range(self.n):
            shapes = self.adapter_shapes([i], {} if rank is None else {i: rank})
            own = sum(math.prod(shape) * width for shape, width in shapes)
            found.append(2 * own + self._optimizer(shapes))
        return found

    def _optimizer(self, shapes: Sequence[tuple[tuple[int, ...], int]]) -> int:
        return optimizer_bytes(self.setting.optimizer, shapes, momentum=self.setting.momentum)

    def deepest(self, k: int) -> tuple[int, ...]:
        """The k adapters that are called last: the cheapest set."""
        return tuple(sorted(sorted(range(self.n), key=self._order)[self.n - k :]))

    def dearest(self, k: int, block: int = 0) -> tuple[int, ...]:
        """A set of k adapters of which the lowest lies in a block, as dear as such sets get."""
        blocks = self.trace.blocks
        allowed = [i for i in range(self.n) if blocks[i] >= block]
        first = max((i for i in allowed if blocks[i] == block), key=lambda i: self.trace.kept([i]))
        # Inputs first: an adapter that shares one costs little more than its h.
        by_size = sorted((i for i in allowed if i != first), key=lambda i: -sum(self.pieces[i].values()))
        held, fresh, late = set(self.pieces[first]), list[int](), list[int]()
        for i in by_size:
            (late if self._input(i) in held else fresh).append(i)
            held |= set(self.pieces[i])
        return tuple(sorted([first, *fresh, *late][:k]))

    def _input(self, index: int) -> int:
        """The largest storage that an adapter keeps."""
        return max(self.pieces[index], key=self.pieces[index].__getitem__)

    def _order(self, index: int) -> int:
        return min((s for s in self.pieces[index] if self.trace.storages[s].ranked), default=0)

    def largest_micro_batch(self, phase: Phase, memory: int, batch: int) -> int | None:
        """The largest divisor of the effective batch with which a phase fits; None where not even 1 does."""
        fitting = [m for m in divisors(batch) if self.parts(phase, m).total <= memory]
        return max(fitting, default=None)

    def micro_batches(self, phases: Sequence[Phase], memory: int, batch: int) -> tuple[int, ...]:
        """The largest micro-batch of each phase.

        Raises:
            PlanError: a phase does not fit with a single example.
        """
        found = []
        for phase in phases:
            size = self.largest_micro_batch(phase, memory, batch)
            if size is None:
                needs = self.parts(phase, 1).total
                raise PlanError(
                    f"phase {phase.name!r} needs {format_bytes(needs)} with one example per forward pass and"
                    f" {len(phase.live)} adapters, more than the {format_bytes(memory)} given;"
                    " `weightlora plan` names what fits"
                )
            found.append(size)
        return tuple(found)


def divisors(batch: int) -> list[int]:
    """The micro-batches that hold an effective batch by accumulation.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [m for m in range(1, batch + 1) if batch % m == 0]


def _prime(model: nn.Module, length: int) -> int:
    """A batch size that divides no width of the model and no number made of the length alone."""
    sizes = {size for p in model.parameters() for size in p.shape} | {length + i for i in (-1, 0, 1)}
    sizes |= {2 * length + i for i in (-1, 0, 1)}
    return next((p for p in _PRIMES if not any(size % p == 0 for size in sizes)), _PRIMES[-1])
