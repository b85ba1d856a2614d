"""What a run asks of a method while it trains.

A policy is four functions: a method's ``begin`` makes it, :meth:`Policy.observe` sees every optimizer step,
:meth:`Policy.decide` says who lives, :meth:`Policy.state` is what a resumed run needs. What else a method does, its
policy declares in its :class:`Setup`. Nobody has to look whether a method was overridden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn

from weightlora.core.budget import total_params
from weightlora.core.growth import Growth, Noise
from weightlora.core.placement import PlacementCosts
from weightlora.errors import ConfigError
from weightlora.graft.adapters import Adapter
from weightlora.graft.forms import Form, Gates, RankGates
from weightlora.graft.selection import Selection

Factors = Sequence[tuple[Tensor, Tensor]]
Weights = Sequence[Tensor]
Seen = TypeVar("Seen")


class HeldOut(Protocol):
    """Batches of training rows that the run does not train on. Looking at them leaves no trace: dropout is off, and the
    random state, the mode and the gradients of the model are as before."""

    def __len__(self) -> int: ...

    def loss(self, index: int) -> Tensor:
        """The model's mean loss on one batch, as it is now; with a graph where the caller's grad mode allows."""
        ...

    def watch(
        self, index: int, look: Callable[[nn.Module], AbstractContextManager[Seen]], *, backward: bool = False
    ) -> Seen:
        """What one of `graft`'s contexts (``output_energy``, ``input_size``, ...) has seen of one batch, with the loss
        taken backward or without."""
        ...

    def directions(self, rho: float) -> Sequence[Tensor]:
        """Of every adapter's inputs the directions that explain most variance among all adapters' directions, as many
        in all as there are ranks and at most `rho` times an adapter's own, each ``(count, d_in)``."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepView:
    """What a policy may look at after an optimizer step. Nothing may be kept beyond the call.

    ``step`` counts from 1; ``lr_factor`` is the schedule's current learning rate over its peak; ``factors`` are the
    live ``(A, B)`` of every adapter in module order, with the gradients that the step was made from, also where the
    adapter was held. ``gates`` is None for a method without omega, ``form`` for one without a form. ``before``: copies
    of the factors from before the step, for a policy that ``compares``. ``products``: sums of ``|dW * dL/ddW|`` per
    adapter since the last step, for one that ``watches``. ``held_out``: the batches that the method needs.
    """

    step: int
    lr_factor: float
    factors: tuple[tuple[Tensor, Tensor], ...]
    gates: Gates | None = None
    form: Form | None = None
    before: tuple[tuple[Tensor, Tensor], ...] = ()
    products: Tensor | None = None
    held_out: HeldOut | None = None

    @property
    def ranks(self) -> RankGates:
        """The rank gates of a policy whose form they are."""
        assert isinstance(self.form, RankGates)
        return self.form


@dataclass(frozen=True, kw_only=True)
class Room:
    """What placements cost and may cost at one micro-batch (None: the same at any)."""

    costs: PlacementCosts
    budget: int
    micro_batch: int | None = None


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the survivors may cost: ``rooms`` from the wanted micro-batch down. ``kind``: of what; ``facts``: more that
    belongs into the selection's record."""

    kind: Literal["memory", "step_time", "kept"]
    rooms: tuple[Room, ...]
    facts: Mapping[str, int | float]


@dataclass(frozen=True, kw_only=True)
class GrowthPlan:
    """How survivors grow at the seam: new ranks by module name, arguments of :func:`weightlora.core.growth.grow`."""

    ranks: Mapping[str, int]
    mode: Growth
    generator: torch.Generator
    options: Mapping[str, str | bool]

    def __post_init__(self) -> None:
        for name, value, known in (("mode", self.mode, Growth), ("noise", self.options.get("noise", "normal"), Noise)):
            if value not in get_args(known):
                raise ConfigError(f"{name}={value!r} is not known; use one of {', '.join(get_args(known))}")
        for name, rank in self.ranks.items():
            if type(rank) is not int or rank < 1:
                raise ConfigError(f"{name} is to grow to rank {rank!r}; give a whole number of 1 or more")


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """Entries of one adapter that a policy has just changed, so that the optimizer's memory of them is no good any
    more: some ranks, or (None) all of it.

    ``gates_only``: of the ranks' gates, not of A and B.
    """

    index: int
    ranks: tuple[int, ...] | None = None
    gates_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Who lives, and all that is to be done about it at the seam (or at the end).

    ``live``: for each adapter the ranks that live on; None: those whose gate is not 0, or all. (An adapter without any
    must not be selected.) ``growth``: how survivors grow. ``shared``: groups of survivors that share A and B from here
    on. ``restart``: survivors train from LoRA's initial values again, drawn from this generator. ``anew``: what the
    optimizer remembers of A and B is mostly a regulariser that ends here, and starts anew. ``peak``: the most numbers
    in adapters that have trained at a time, where not all that is allocated did.
    """

    selection: Selection
    live: Sequence[Sequence[int]] | None = None
    growth: GrowthPlan | None = None
    shared: Sequence[Sequence[str]] = ()
    restart: torch.Generator | None = None
    anew: bool = False
    peak: int | None = None


def lora_params(live: Sequence[Adapter]) -> int:
    """Numbers in plain adapters, ``sum r (d_in + d_out)``; shared factors count once."""
    own = [a for a in live if a.tied is None]
    return total_params([a.rows for a in own], [a.shape for a in own])


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a policy declares. The first six are done to the model before the first step, in this order.

    Args:
        look: measures the model as it is, once, where a run is not resumed: it is given the frozen weights one at a
            time, and the held-out batches. The policy may declare another setup from what it has seen.
        check: refuses base layers by their weights, ``(d_out, d_in)`` each, which are read only.
        ranks: rank and scale to give each adapter; what is added is zero in A and in B. Empty: those it has.
        ties: groups of adapters that share A and B from the start, by index.
        start: sets initial values; left out where a run is resumed.
        form: how the factors that compute come about, where not directly.
        gates: whether the run has the omega vector, and whether the policy sets it or lets it learn.
        compares: the policy is shown ``StepView.before``.
        restarts: its decision lets the survivors start again.
        penalty: a term of the loss that depends on factors and gates alone. Its gradient is added after clipping, once
            per optimizer step, so that neither accumulation nor the task's loss changes its weight.
        count: the parameter formula: numbers that the method has trained for these plain adapters.
    """

    look: Callable[[Iterator[Tensor], HeldOut | None], None] | None = None
    check: Callable[[Weights], None] | None = None
    ranks: Sequence[tuple[int, float]] = ()
    ties: Sequence[Sequence[int]] = ()
    start: Callable[[Factors, Weights, HeldOut | None], None] | None = None
    form: Callable[[Factors], Form] | None = None
    gates: Literal["none", "set", "learn"] = "none"
    compares: bool = False
    restarts: bool = False
    penalty: Callable[[StepView], Tensor | None] | None = None
    count: Callable[[Sequence[Adapter]], int] = lora_params

    def starting_ranks(self) -> dict[int, int]:
        """The rank of every adapter whose rank is set, by its index."""
        return {index: rank for index, (rank, _) in enumerate(self.ranks)}


class Remembers:
    """What of something a resumed run needs: tensors, by the names of their attributes."""

    remembered: ClassVar[tuple[str, ...]] = ()

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs beside weights, gates and forms."""
        return {name: getattr(self, name).cpu() for name in self.remembered}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put :meth:`state` back."""
        for name in self.remembered:
            setattr(self, name, state[name].clone())


class Policy(Remembers, ABC):
    """The decisions of one run.

    ``seam`` is the optimizer step after which surgery happens: 0 before training, None never (then :meth:`decide` is
    asked once, at the end). ``held``: adapters whose A and B must not move in the coming step. ``watches``: it needs
    ``StepView.products`` (False after some step: no more). ``budget``: what survivors may cost, for a method with a
    :class:`~weightlora.methods.base.Limit`; there before the first step.
    """

    seam: int | None = None
    held: Sequence[int] = ()
    watches: bool = False
    budget: Budget | None = None

    def __init__(self, adapters: tuple[Adapter, ...], setup: Setup | None = None) -> None:
        self.adapters, self.setup = adapters, setup or Setup()

    def observe(self, view: StepView) -> Sequence[Fresh]:
        """Look at a step up to the seam, and change what the method changes; say where the optimizer starts anew."""
        return ()

    @abstractmethod
    def decide(self, omegas: Sequence[float]) -> Decision:
        """Which adapters live, and why.

        Args:
            omegas: the gate of every adapter; all 1 without gates.
        """


class Fixed(Policy):
    """A decision that needs no training: made at the start (``seam = 0``), or nothing to decide (``seam = None``)."""

    def __init__(
        self,
        adapters: tuple[Adapter, ...],
        selection: Selection,
        seam: int | None = None,
        setup: Setup | None = None,
    ) -> None:
        super().__init__(adapters, setup)
        self.selection, self.seam = selection, seam

    def decide(self, omegas: Sequence[float]) -> Decision:
        return Decision(selection=self.selection)


class Restarting(Policy):
    """A policy after whose seam the survivors start again, from values that ``seed`` decides."""

    def __init__(self, adapters: tuple[Adapter, ...], setup: Setup, seed: int) -> None:
        super().__init__(adapters, replace(setup, restarts=True))
        self.restart = torch.Generator().manual_seed(seed)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"restart": self.restart.get_state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self.restart.set_state(state["restart"])


def slope(held_out: HeldOut, index: int, leaf: Tensor) -> Tensor:
    """``dL/dleaf`` on one held-out batch, of gates that training itself leaves alone; nothing is left in ``.grad``."""
    leaf.requires_grad_(True)
    try:
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(held_out.loss(index), leaf)
    finally:
        leaf.requires_grad_(False)
    return grad
