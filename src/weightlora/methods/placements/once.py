"""What the published placements share: they look once, before the first step, and keep what their rule names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from weightlora.graft.adapters import Adapter
from weightlora.methods.base import AdapterMethod, Needs
from weightlora.methods.budgets import SpendingMethod
from weightlora.methods.policy import Decision, HeldOut, Policy, Setup
from weightlora.settings import setting


@dataclass(frozen=True, kw_only=True)
class OneLook(AdapterMethod):
    """A rule in two halves: what it measures of the model as it is, and which adapters stay for what it found."""

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"paper": {}, "official": {}}  # the class's own defaults

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> Policy:
        return OneLookPolicy(self, adapters)

    @abstractmethod
    def measure(self, adapters: Sequence[Adapter], weights: Iterator[Tensor], held_out: HeldOut | None) -> list[float]:
        """The score of every adapter; more is better.

        Args:
            adapters: all of them.
            weights: their frozen weights ``(d_out, d_in)``, one at a time.
            held_out: rows that the run does not train on, where the method needs some.
        """

    @abstractmethod
    def keep(self, adapters: Sequence[Adapter], scores: Sequence[float]) -> tuple[Sequence[int], str]:
        """Which adapters stay, by index, and why."""


@dataclass(frozen=True, kw_only=True)
class SeeingMethod(SpendingMethod):
    """Settings of a method that sees the model at work, on `batches` batches of rows that it does not train on."""

    batches: int = setting(8, least=1)

    @property
    def needs(self) -> Needs:
        return replace(super().needs, held_out=self.batches)


@dataclass(frozen=True, kw_only=True)
class Placement(OneLook, SpendingMethod):
    """Settings of a rule that says itself how many adapters stay.

    Args:
        spend: parameters: what stays gets ranks for them, one and the same but for one more where the score is largest
            (`--params` sets it). None: the ranks it has.
        seed: of the initial values, where ranks grow.
    """

    chooses_k: ClassVar[bool] = True

    seed: int = 0

    @property
    def needs(self) -> Needs:
        return replace(super().needs, grows=self.spend is not None)


@dataclass(frozen=True, kw_only=True)
class SeeingPlacement(SeeingMethod, Placement):
    """Settings of such a rule that sees the model at work."""


class OneLookPolicy(Policy):
    """Looks where a run begins, and decides before its first step; see :class:`OneLook`."""

    seam = 0

    def __init__(self, method: OneLook, adapters: tuple[Adapter, ...]) -> None:
        self.spend = method.spend if isinstance(method, SpendingMethod) else None
        super().__init__(adapters, Setup(look=self.look, restarts=self.spend is not None))
        self.method = method
        self.scores: list[float] = []

    def look(self, weights: Iterator[Tensor], held_out: HeldOut | None) -> None:
        """Measure; nothing is changed."""
        self.scores = self.method.measure(self.adapters, weights, held_out)

    def decide(self, omegas: Sequence[float]) -> Decision:
        kept, why = self.method.keep(self.adapters, self.scores)
        selection = self.method.choose(self.adapters, sorted(kept), why, step=0, scores=self.scores)
        if not isinstance(self.method, Placement) or self.spend is None:
            return Decision(selection=selection)
        growth = self.method.grown(self.adapters, sorted(kept), self.scores)
        return Decision(selection=selection, growth=growth, restart=torch.Generator().manual_seed(self.method.seed))
