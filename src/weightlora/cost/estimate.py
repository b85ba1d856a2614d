"""What each phase of training takes, for any set of live adapters, rank and micro-batch, over one trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from weightlora.core.placement import PlacementCosts
from weightlora.cost.activations import ActivationTrace
from weightlora.cost.parallel import Moved, Parallel, Traffic, beside, traffic
from weightlora.cost.placements import placement_costs, reserved
from weightlora.cost.tensors import Shaped, frozen_bytes, optimizer_bytes, shapes_of, tensor_bytes, weight_bytes
from weightlora.cost.tracing import trace
from weightlora.graft.adapters import adapter_name, adapters, parameters

# Batch sizes to trace with: what is a multiple of such a number must come from the batch.
_PRIMES = (11, 13, 17, 19, 23, 29, 31)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training in which no tensor changes shape.

    ``live``: indices of live adapters. ``ranks``: of those whose rank is not the model's. ``gated``: layers keep omega;
    ``trains_gates``: it gets gradients there. ``inputs``: the embeddings' outputs require a gradient, as checkpointing
    makes them until the seam. ``copies``: copies of all A and B that the method holds.
    """

    name: str
    live: tuple[int, ...]
    ranks: Mapping[int, int] = field(default_factory=dict)
    gated: bool = False
    trains_gates: bool = True
    inputs: bool = False
    copies: int = 0


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """Where the bytes of one phase go, at the moment when forward has ended and backward begins.

    ``weights``: frozen parameters and buffers, quantised where asked. ``adapters``: A, B and the method's copies of
    them. ``heads``: whatever else trains. ``gates``: omega and its gradient. ``gradients``, ``optimizer``: of all that
    trains. ``activations``: what autograd keeps. ``recomputed``: what the largest checkpointed block keeps while
    backward goes through it. ``workspace``: an estimate for what is alive for a moment (a gradient as large as the
    largest activation, a dequantised weight). ``overhead``: what a probe measured beyond the prediction.
    ``parallel``: what training on several devices holds beside (a model, not measured).
    """

    weights: int
    adapters: int
    heads: int
    gates: int
    gradients: int
    optimizer: int
    activations: int
    recomputed: int
    workspace: int
    overhead: int = 0
    parallel: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    @property
    def held(self) -> int:
        """What tensors hold, on any machine: all but `workspace`, `overhead` and `parallel`."""
        return self.total - self.workspace - self.overhead - self.parallel


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What can be changed without tracing again.

    ``optimizer``, ``quantization``: as in :mod:`weightlora.cost.tensors`. ``checkpointing``: blocks are computed anew
    in backward; ``every_n_layers``: only every so many-th. ``overhead``: bytes that a probe measured beyond the
    prediction. ``parallel``: devices, and how tensors are spread over them.
    """

    optimizer: str = "adamw_torch"
    quantization: str | None = None
    checkpointing: bool = False
    every_n_layers: int = 1
    overhead: int = 0
    parallel: Parallel = field(default_factory=Parallel)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A model with what its forward keeps for a batch of `batch` rows, and by that for any batch."""

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
        """Trace a model once.

        Args:
            model: with every adapter live; on the meta device or with weights.
            loss: the forward pass of a batch of a given size.
            length: tokens of a row (so that the traced batch size divides nothing else).
            stock, cuda: as :func:`weightlora.cost.trace`.
        """
        # A batch size that divides no width of the model and no number made of the length alone.
        sizes = {size for p in model.parameters() for size in p.shape}
        sizes |= {times * length + i for times in (1, 2) for i in (-1, 0, 1)}
        batch = next((p for p in _PRIMES if not any(size % p == 0 for size in sizes)), _PRIMES[-1])
        return cls(model=model, trace=trace(model, loss(batch), stock=stock, cuda=cuda), batch=batch)

    def at(self, micro_batch: int) -> ActivationTrace:
        """The trace of another batch size."""
        return self.trace.at(micro_batch, self.batch)


class Estimate:
    """Answer what phases cost. The model is read once, here; afterwards it may change.

    Args:
        model: with every adapter live; on the meta device or with weights.
        trace_of: the trace of a micro-batch of a given size; asked once for each.
        setting: optimizer, checkpointing, quantisation.
    """

    def __init__(
        self,
        model: nn.Module,
        trace_of: Callable[[int], ActivationTrace],
        setting: Setting | None = None,
    ) -> None:
        self.setting, self._trace_of = setting or Setting(), trace_of
        name = adapter_name(model)
        pairs = list(parameters(model, name).values())
        self._experts = [a.experts or 1 for a in adapters(model, name)]
        own = {id(p): p for pair in pairs for p in pair}
        heads = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        self._pairs = [shapes_of(pair) for pair in pairs]
        self._trains = [[p.requires_grad for p in pair] for pair in pairs]
        frozen = tensor_bytes([p for p in own.values() if not p.requires_grad])  # counted with the adapters
        self.weights = weight_bytes(model, self.setting.quantization) - frozen
        self.heads, self.head_shapes = tensor_bytes(heads), shapes_of(heads)
        units = [path for path, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
        self._blocks = [frozen_bytes(model, self.setting.quantization, f"{path}.") for path in units]
        self._buffers = tensor_bytes(list(model.buffers()))
        # A quantised weight is multiplied in full precision, one at a time.
        full = [m.weight.numel() * m.weight.element_size() for m in model.modules() if isinstance(m, nn.Linear)]
        self.dequantised = 0 if self.setting.quantization is None else max(full)
        self._at: dict[int, ActivationTrace] = {}

    @property
    def n(self) -> int:
        """The number of adapters."""
        return len(self._pairs)

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on adapters: weights, and heads with gradients and optimizer state."""
        return self.weights + 2 * self.heads + self._optimizer(self.head_shapes)

    def at(self, micro_batch: int) -> ActivationTrace:
        """The trace for a micro-batch."""
        if micro_batch not in self._at:
            self._at[micro_batch] = self._trace_of(micro_batch)
        return self._at[micro_batch]

    def trainable_params(self, phase: Phase) -> int:
        """Numbers that train: adapters, heads, gates."""
        adapters = sum(
            math.prod(shape)
            for i in phase.live
            for (shape, _), trains in zip(self._shapes([i], phase.ranks), self._trains[i], strict=True)
            if trains
        )
        heads = sum(math.prod(shape) for shape, _ in self.head_shapes)
        return adapters + heads + (len(phase.live) if phase.gated and phase.trains_gates else 0)

    def activations(self, phase: Phase, micro_batch: int) -> int:
        """Bytes kept between forward and backward; of a gated layer its omega, and with it the vector of all n."""
        kept = self.at(micro_batch).kept(
            phase.live,
            ranks=phase.ranks,
            checkpointing=self.setting.checkpointing,
            every_n_layers=self.setting.every_n_layers,
            inputs=phase.inputs,
        )
        return kept + self._omega(phase)

    def cost(self, phase: Phase, micro_batch: int) -> PhaseCost:
        """Where the bytes of a phase go."""
        at, every = self.at(micro_batch), self.setting.every_n_layers
        shapes = self._shapes(phase.live, phase.ranks)
        adapters = _bytes(shapes)
        again = at.recomputed(phase.live, ranks=phase.ranks, every_n_layers=every) if self.setting.checkpointing else 0
        held = self.setting.parallel.held
        return PhaseCost(
            weights=held(self.weights - self._buffers) + self._buffers,
            adapters=held(adapters) + phase.copies * _bytes(self._shapes(range(self.n))),
            heads=held(self.heads),
            gates=2 * self._omega(phase),
            gradients=held(adapters + self.heads),
            optimizer=held(self._optimizer([*shapes, *self.head_shapes])),
            activations=self.activations(phase, micro_batch) - self._omega(phase),
            recomputed=again,
            workspace=at.largest(phase.live) + self.dequantised,
            overhead=self.setting.overhead,
            parallel=beside(self.setting.parallel, self.moved(phase)),
        )

    def moved(self, phase: Phase) -> Moved:
        """What a step of a phase has to move between devices."""
        blocks, gradients = list(self._blocks), [0] * len(self._blocks)
        outside = self.weights - self._buffers - sum(blocks) + self.heads
        rest = self.heads + (self._omega(phase) if phase.trains_gates else 0)
        where = self.at(1).blocks
        for i in phase.live:
            size = _bytes(self._shapes([i], phase.ranks))
            if where[i] < 0:
                outside, rest = outside + size, rest + size
            else:
                blocks[where[i]] += size
                gradients[where[i]] += size
        lowest = 0 if phase.inputs else min((where[i] for i in phase.live), default=len(blocks))
        return Moved(blocks=blocks, outside=outside, lowest=max(0, lowest), gradients=gradients, rest=rest)

    def traffic(self, phase: Phase, accumulation: int) -> Traffic:
        """What each device sends in an optimizer step of `accumulation` micro-batches."""
        return traffic(self.setting.parallel, self.moved(phase), accumulation)

    def state(self) -> list[int]:
        """(n,) bytes of each adapter's parameters, gradients and optimizer state."""
        return [2 * _bytes(shapes) + self._optimizer(shapes) for shapes in self._pairs]

    def placements(self, micro_batch: int, *, grows: bool = False) -> PlacementCosts:
        """Bytes of any set of survivors, as the sum that an exact search works with.

        Args:
            micro_batch: examples of a forward pass.
            grows: survivors take over the parameters of all n.
        """
        setting = self.setting
        costs = placement_costs(
            self.at(micro_batch), self.state(), base=self.fixed, checkpointing=setting.checkpointing
        )
        return reserved(costs, self._counts()) if grows else costs

    def kept_placements(self, micro_batch: int, *, grows: bool = False) -> PlacementCosts:
        """The same for what is kept between forward and backward alone."""
        costs = placement_costs(self.at(micro_batch), checkpointing=self.setting.checkpointing)
        return reserved(costs, self._counts()) if grows else costs

    def _counts(self) -> list[int]:
        return [sum(math.prod(shape) for shape, _ in shapes) for shapes in self._pairs]

    def under(self, *, checkpointing: bool) -> Estimate:
        """The same model with blocks checkpointed or not."""
        other = copy.copy(self)
        other.setting = replace(self.setting, checkpointing=checkpointing)
        return other

    def largest_micro_batch(self, phase: Phase, memory: int, batch: int) -> int | None:
        """The largest divisor of the effective batch with which a phase fits; None where not even 1 does."""
        return next((m for m in divisors(batch)[::-1] if self.cost(phase, m).total <= memory), None)

    def _shapes(self, live: Iterable[int], ranks: Mapping[int, int] | None = None) -> list[Shaped]:
        """``(shape, bytes per number)`` of A and B of some adapters."""
        found: list[Shaped] = []
        for i in live:
            ((r, *d_in), a_width), ((d_out, _, *more), b_width) = self._pairs[i]
            rows = (ranks or {}).get(i, r // self._experts[i]) * self._experts[i]
            found += [((rows, *d_in), a_width), ((d_out, rows, *more), b_width)]
        return found

    def _optimizer(self, shapes: list[Shaped]) -> int:
        return optimizer_bytes(self.setting.optimizer, shapes)

    def _omega(self, phase: Phase) -> int:
        return 4 * self.n if phase.gated else 0


def divisors(batch: int) -> list[int]:
    """The micro-batches that hold an effective batch by accumulation.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [m for m in range(1, batch + 1) if batch % m == 0]


def _bytes(shapes: Iterable[Shaped]) -> int:
    return sum(math.prod(shape) * width for shape, width in shapes)
