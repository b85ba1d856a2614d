"""LoRA-drop: adapters with a large output keep their own factors, the rest of a kind share one pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from weightlora.core.importance import smallest_prefix
from weightlora.errors import ScheduleError
from weightlora.graft.adapters import Adapter
from weightlora.graft.watch import output_energy
from weightlora.methods.base import Needs
from weightlora.methods.budgets import SpendingMethod, spread
from weightlora.methods.checks import check_select_after
from weightlora.methods.policy import Decision, Fresh, GrowthPlan, Restarting, Setup, StepView
from weightlora.methods.tied_lora import sharers
from weightlora.settings import setting


@dataclass(frozen=True, kw_only=True)
class LoRADrop(SpendingMethod):
    """Plain LoRA for a while; then, in each kind of module, those adapters whose output carries the most keep factors
    of their own and all others share a single pair. Everything starts again from LoRA's initial values.

    ``g_i = sum over tokens of ||dW_i x_i||^2`` on held-out training rows (each class gives its share),
    ``I_i = g_i / sum over the kind of g_j``; the smallest prefix of the sorted I that reaches `threshold` keeps its
    own.

    Args:
        select_after: length of the first stage, in optimizer steps or as a share of the run.
        threshold: T, the share of the output that adapters of their own must carry.
        batches: held-out batches on which the output is measured.
        spend: parameters of the second stage: the pairs that are left get ranks for them, the same for all up to one
            (`--params` sets it). None: the ranks they have.
        seed: of the generator that draws the second stage's initial values.

    Raises:
        ConfigError: a setting has a value that is not allowed.

    Source: Zhou et al. 2024. Departs in that the first stage trains on the run's own rows and is part of its steps,
    and that schedule and head run on across the seam.

    >>> LoRADrop(threshold=0.8).threshold
    0.8
    """

    name: ClassVar[str] = "lora_drop"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {"select_after": 0.1, "threshold": 0.9},  # the sample is 10% of the rows; T = 0.9
    }

    select_after: int | float = 0.1
    threshold: float = setting(0.9, above=0, most=1, use="a share above 0 and at most 1")
    batches: int = setting(8, least=1)
    seed: int = 0

    @property
    def needs(self) -> Needs:
        return Needs(held_out=self.batches, grows=self.spend is not None)

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> LoRADropPolicy:
        return LoRADropPolicy(self, adapters, max_steps)


class LoRADropPolicy(Restarting):
    """Measures outputs once, at the seam; see :class:`LoRADrop`."""

    remembered: ClassVar[tuple[str, ...]] = ("energies",)

    def __init__(self, method: LoRADrop, adapters: tuple[Adapter, ...], max_steps: int) -> None:
        super().__init__(adapters, Setup(), method.seed)
        self.method = method
        self.seam = check_select_after(method.select_after, max_steps)
        self.energies = torch.zeros(len(adapters), dtype=torch.float64)

    def observe(self, view: StepView) -> Sequence[Fresh]:
        if view.step == self.seam:
            assert view.held_out is not None
            batches = range(len(view.held_out))
            self.energies = torch.stack([view.held_out.watch(index, output_energy) for index in batches]).sum(0)
        return ()

    def importance(self) -> list[float]:
        """I of every adapter: its share of the output energy of its kind."""
        energies = self.energies.tolist()
        if not all(map(math.isfinite, energies)) or not any(energies):
            raise ScheduleError(
                f"the adapters' outputs are all zero or not finite after {self.seam} steps;"
                " lower the learning rate, or raise select_after"
            )
        totals: dict[str, float] = {}
        for adapter, energy in zip(self.adapters, energies, strict=True):
            totals[adapter.kind] = totals.get(adapter.kind, 0.0) + energy
        return [g / totals[a.kind] if totals[a.kind] else 0.0 for a, g in zip(self.adapters, energies, strict=True)]

    def own(self) -> list[int]:
        """Adapters that keep factors of their own, in module order."""
        shares, found = self.importance(), []
        for kind in dict.fromkeys(a.kind for a in self.adapters):
            members = [a.index for a in self.adapters if a.kind == kind]
            found += [members[i] for i in smallest_prefix([shares[m] for m in members], self.method.threshold)]
        return sorted(found)

    def decide(self, omegas: Sequence[float]) -> Decision:
        own, n = len(self.own()), len(self.adapters)
        why = (
            f"{own} of {n} carry {self.method.threshold:g} of the output of their kind after {self.seam} steps and keep"
            " factors of their own; the rest of a kind share one pair"
        )
        selection = self.method.choose(self.adapters, range(n), why, step=self.seam, scores=self.importance())
        shared = [[a.name for a in group] for group in self._groups()]
        return Decision(selection=selection, growth=self._growth(), shared=shared, restart=self.restart)

    def _groups(self) -> list[tuple[Adapter, ...]]:
        """Adapters that will share one pair."""
        own = set(self.own())
        rest = [a for a in self.adapters if a.index not in own]
        return [tuple(rest[i] for i in group) for group in sharers(rest)]

    def _growth(self) -> GrowthPlan | None:
        if self.method.spend is None:
            return None
        shares = self.importance()
        own = sorted(self.own(), key=lambda i: (-shares[i], i))
        pairs = [*((self.adapters[i],) for i in own), *self._groups()]
        return spread(self.method.spend, pairs, range(len(pairs)))
