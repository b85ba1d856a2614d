"""What a run asks of a method while it trains.

A policy is four functions: a method's ``begin`` makes it, :meth:`Policy.observe` sees every optimizer step,
:meth:`Policy.decide` says who lives, :meth:`Policy.state` is what a resumed run needs. What else a method does, its
policy declares: by the flags of :class:`Policy`, or by deriving from the classes that follow it. Nobody has to look
whether a method was overridden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from weightlora.core import PlacementCosts, total_params
from weightlora.graft import Adapter, Form, Gates, RankGates, Selection

Factors = Sequence[tuple[Tensor, Tensor]]


class HeldOut(Protocol):
    """Batches of training rows that the run does not train on. Looking at them leaves no trace: dropout is off, and the
    random state, the mode and the gradients of the model are as before."""

    def __len__(self) -> int: ...

    def loss(self, index: int) -> Tensor:
        """The model's mean loss on one batch, as it is now; with a graph where the caller's grad mode allows."""
        ...

    def output_energy(self, index: int) -> Tensor:
        """``sum over tokens of ||dW_i x||^2`` of every adapter on one batch, ``(n,)`` float64."""
        ...

    def input_size(self, index: int) -> Sequence[Tensor]:
        """``mean over tokens of |x_j|`` of every adapter's inputs on one batch, each ``(d_in,)`` float32."""
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

    kind: Literal["memory", "step_time"]
    rooms: tuple[Room, ...]
    facts: Mapping[str, int | float]


@dataclass(frozen=True, kw_only=True)
class GrowthPlan:
    """How the survivors grow at the seam: new ranks by module name, and arguments of :func:`weightlora.core.grow`."""

    ranks: Mapping[str, int]
    mode: Any
    generator: torch.Generator
    options: Mapping[str, Any]


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


class Policy(ABC):
    """The decisions of one run.

    ``seam`` is the optimizer step after which surgery happens: 0 before training, None never (then :meth:`decide` is
    asked once, at the end). ``gated``: the run needs the omega vector, which the policy ``trains_gates`` or sets.
    ``compares``: it needs ``StepView.before``. ``watches``: it needs ``StepView.products`` (False after some step: no
    more). ``held``: adapters whose A and B must not move in the coming step.
    """

    seam: int | None = None
    gated: bool = False
    trains_gates: bool = False
    compares: bool = False
    watches: bool = False
    held: Sequence[int] = ()

    def __init__(self, adapters: tuple[Adapter, ...]) -> None:
        self.adapters = adapters

    def observe(self, view: StepView) -> Sequence[Fresh]:
        """Look at a step up to the seam, and change what the method changes; say where the optimizer starts anew."""
        return ()

    @abstractmethod
    def decide(self, omegas: Sequence[float]) -> Decision:
        """Which adapters live, and why.

        Args:
            omegas: the gate of every adapter; all 1 without gates.
        """

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs beside weights, gates and forms."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put :meth:`state` back."""


class ReadsWeights(ABC):
    """A policy that starts from the base layers' weights."""

    @abstractmethod
    def check(self, weights: Sequence[Tensor]) -> None:
        """Refuse base layers that the method cannot work on; nothing has been changed yet."""


class Allocates(ABC):
    """A policy that gives every adapter another rank. What is added is zero in A and in B."""

    @abstractmethod
    def allocate(self) -> Sequence[tuple[int, float]]:
        """Rank and scale of every adapter."""


class Ties(ABC):
    """A policy under which adapters share A and B from the start."""

    @abstractmethod
    def ties(self) -> Sequence[Sequence[int]]:
        """Groups of adapters that share."""


class Starts(ABC):
    """A policy with initial values of its own."""

    @abstractmethod
    def prepare(self, factors: Factors, weights: Sequence[Tensor], held_out: HeldOut | None) -> None:
        """Set them, before the first step of a fresh run; ``weights`` are the base layers', and are read only."""


class Forms(ABC):
    """A policy whose trained factors are not those that compute."""

    @abstractmethod
    def form(self, factors: Factors) -> Form | None:
        """How the computing factors come about; None: directly after all."""


class Penalises(ABC):
    """A policy with a term of its own in the loss."""

    @abstractmethod
    def penalty(self, view: StepView) -> Tensor | None:
        """A term that depends on the factors and gates alone. Its gradient is added after clipping, once per optimizer
        step, so that neither accumulation nor the task's loss changes its weight."""


class Budgeted:
    """A policy that chooses what a budget pays for; ``budget`` is there once the run has counted it."""

    budget: Budget | None = None


class Restarts(Policy):
    """A policy after whose seam the survivors start again, from values that ``seed`` decides."""

    def __init__(self, adapters: tuple[Adapter, ...], seed: int) -> None:
        super().__init__(adapters)
        self.restart = torch.Generator().manual_seed(seed)

    def state(self) -> dict[str, Tensor]:
        return {"restart": self.restart.get_state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.restart.set_state(state["restart"])


class Counts(ABC):
    """A policy with a parameter formula of its own."""

    @abstractmethod
    def count(self, live: Sequence[Adapter]) -> int:
        """Numbers that the method has trained for these plain adapters."""


class Fixed(Policy):
    """A decision that needs no training: made at the start (``seam = 0``), or nothing to decide (``seam = None``)."""

    def __init__(self, adapters: tuple[Adapter, ...], selection: Selection, seam: int | None = None) -> None:
        super().__init__(adapters)
        self.selection, self.seam = selection, seam

    def decide(self, omegas: Sequence[float]) -> Decision:
        return Decision(selection=self.selection)


def lora_params(live: Sequence[Adapter]) -> int:
    """Numbers in plain adapters, ``sum r (d_in + d_out)``; shared factors count once."""
    own = [a for a in live if a.tied is None]
    return total_params([a.rank for a in own], [a.shape for a in own])


def trained_params(policy: Policy, live: Sequence[Adapter]) -> int:
    """Numbers that a method has trained for these plain adapters."""
    return policy.count(live) if isinstance(policy, Counts) else lora_params(live)


def starting_ranks(policy: Policy) -> dict[int, int]:
    """The rank of every adapter whose rank the policy sets, by its index."""
    return {i: rank for i, (rank, _) in enumerate(policy.allocate())} if isinstance(policy, Allocates) else {}


def slope(held_out: HeldOut, index: int, leaf: Tensor) -> Tensor:
    """``dL/dleaf`` on one held-out batch, of gates that training itself leaves alone; nothing is left in ``.grad``."""
    leaf.requires_grad_(True)
    try:
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(held_out.loss(index), leaf)
    finally:
        leaf.requires_grad_(False)
    return grad
