"""What a run asks of a method while it trains: one policy decides; what it may look at, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

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
    """What a policy may look at in one optimizer step. Gradients are there; nothing may be kept beyond the call.

    ``step`` counts from 1; ``lr_factor`` is the schedule's current learning rate over its peak; ``factors`` are the
    live ``(A, B)`` of every adapter in module order; ``gates`` is None for a method without omega, ``form`` for one
    without a form. ``products`` are sums of ``|dW * dL/ddW|`` per adapter since the last step, for a policy that asked
    (``watches``); ``held_out`` the batches that it asked for.
    """

    step: int
    lr_factor: float
    factors: tuple[tuple[Tensor, Tensor], ...]
    gates: Gates | None
    form: Form | None = None
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
    """Entries of one adapter whose optimizer state must start anew: some ranks, or (None) all of it.

    ``gates_only``: of the ranks' gates, not of A and B.
    """

    index: int
    ranks: tuple[int, ...] | None = None
    gates_only: bool = False


class Policy(ABC):
    """The decisions of one run. Abstract methods are overridden; of the others those that the method needs.

    ``seam`` is the optimizer step after which surgery happens: 0 before training, None never (then :meth:`decide` is
    asked once, at the end). ``gated`` says whether the run needs the omega vector, ``watches`` whether it needs
    ``StepView.products`` (False after some step: no more). ``restart``: after the seam the survivors train from LoRA's
    initial values again, drawn from this generator. ``anew``: a regulariser that ends at the seam fills the optimizer's
    memory of A and B, which then starts anew there. ``held_out``: the batches that the method asked for, there from
    :meth:`prepare` on. ``budget``: what survivors may cost, for a method that asked (:attr:`Method.limit`).
    """

    seam: int | None = None
    gated: bool = False
    trains_gates: bool = False
    watches: bool = False
    restart: torch.Generator | None = None
    anew: ClassVar[bool] = False
    held_out: HeldOut | None = None
    budget: Budget | None = None

    def __init__(self, adapters: tuple[Adapter, ...]) -> None:
        self.adapters = adapters

    # Before the first step, in this order; in a resumed run too, but for `prepare`.

    def check(self, weights: Sequence[Tensor]) -> None:
        """Refuse base layers that the method cannot work on; nothing has been changed yet."""

    def allocate(self) -> Sequence[tuple[int, float]] | None:
        """Rank and scale to give each adapter, or None for those it has. What is added is zero: see :meth:`prepare`."""
        return None

    def ties(self) -> Sequence[Sequence[int]]:
        """Groups of adapters that share A and B from the start."""
        return ()

    def form(self, factors: Factors) -> Form | None:
        """How the factors that compute come about, if not directly."""
        return None

    def prepare(self, factors: Factors, weights: Sequence[Tensor]) -> None:
        """Before the first step of a fresh run: change initial values. `weights` are the base layers' (read only)."""

    # In every step.

    def penalty(self, view: StepView) -> Tensor | None:
        """A term of the loss that depends on the factors and gates alone. Its gradient is added after clipping, once
        per optimizer step, so that neither accumulation nor the task's loss changes its weight."""
        return None

    def before_step(self, view: StepView) -> None:
        """Gradients are final (after clipping), the optimizer has not stepped."""

    def after_step(self, view: StepView) -> None:
        """The optimizer has stepped, gradients are still there."""

    def held(self) -> Sequence[int]:
        """Adapters whose A and B must not move in the coming step (their gradient is withheld from the optimizer)."""
        return ()

    def fresh(self) -> Sequence[Fresh]:
        """What :meth:`after_step` has just changed so that the optimizer's memory of it is no good any more."""
        return ()

    # At the seam, or at the end.

    @abstractmethod
    def decide(self, omegas: Sequence[float]) -> Selection:
        """Which adapters live, and why. `omegas` are the gates (all 1 without gates)."""

    def growth(self, selection: Selection) -> GrowthPlan | None:
        """How the survivors grow, or None."""
        return None

    def live(self, form: Form) -> Sequence[Sequence[int]] | None:
        """For each adapter the ranks that live on; None: all. (An adapter without any must not be selected.)"""
        return form.live() if isinstance(form, RankGates) else None

    def shared(self, selection: Selection) -> Sequence[Sequence[str]]:
        """Groups of survivors that share A and B from the seam on."""
        return ()

    def count(self, live: Sequence[Adapter]) -> int:
        """Numbers that the method has trained for these plain adapters: its parameter formula."""
        return total_params([a.rank for a in live if a.tied is None], [a.shape for a in live if a.tied is None])

    def peak(self) -> int | None:
        """The most numbers in adapters that have trained at a time, where not all that is allocated does; else None."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs beside weights and gates."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put :meth:`state` back."""


def slope(held_out: HeldOut, index: int, leaf: Tensor) -> Tensor:
    """``dL/dleaf`` on one held-out batch, of gates that training itself leaves alone; nothing is left in ``.grad``."""
    leaf.requires_grad_(True)
    try:
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(held_out.loss(index), leaf)
    finally:
        leaf.requires_grad_(False)
    return grad
