"""WeightLoRA+: the adapters that WeightLoRA keeps grow into the parameters that it set free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch

from weightlora.core.budget import Remainder, grown_ranks, rank_for_params, total_params
from weightlora.core.growth import Growth, Noise
from weightlora.errors import ScheduleError
from weightlora.graft.adapters import Adapter
from weightlora.graft.selection import Selection
from weightlora.methods.base import Needs, Shapes
from weightlora.methods.policy import Decision, GrowthPlan
from weightlora.methods.weightlora.policy import WeightLoRAPolicy
from weightlora.methods.weightlora.presets import WEIGHTLORA_PLUS
from weightlora.methods.weightlora.settings import WeightLoRA
from weightlora.settings import setting

P = TypeVar("P", bound="WeightLoRAPlus")


@dataclass(frozen=True, kw_only=True)
class WeightLoRAPlus(WeightLoRA):
    """Select as WeightLoRA, then let the kept adapters grow in rank to the parameters that all n had.

    ``[B, 0] [A; N] = B A``: the update stays the same, and so does PEFT's scale, so the loss does not jump.

    Args:
        growth: "gaussian" or "qr" (paper, section 3.4).
        noise: "normal", or the official code's "uniform".
        orthonormal: with "qr", orthonormalise the new directions (the paper prints them raw).
        remainder: "drop" keeps one rank for all (servers need that); "top" gives left-over ranks to the best adapters.
        max_rank: highest rank after growth (for example 64, a server's limit).
        comeback: whether a gate that a projection before T has set to 0 may rise again (the paper's rule). False: it
            stays 0, as in the official code, which removes the adapter.
        seed: of the generator that draws new directions.

    Source: paper, section 3.4.
    """

    name: ClassVar[str] = "weightlora+"
    spending: ClassVar[str] = "ranks are whole numbers, and no rank is above a layer's width"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = WEIGHTLORA_PLUS

    growth: Growth = "gaussian"
    noise: Noise = "normal"
    orthonormal: bool = True
    remainder: Remainder = "drop"
    max_rank: int | None = setting(None, least=1)
    comeback: bool = True
    seed: int = 0

    @property
    def needs(self) -> Needs:
        return replace(super().needs, grows=True, max_rank=self.max_rank)

    def within(self: P, params: int, shapes: Shapes, rank: int, kinds: Sequence[str] = ()) -> tuple[P, int]:
        # It ends with the parameters of all n, so the budget is theirs; K stays.
        return self, rank_for_params(params, shapes)

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> WeightLoRAPolicy:
        if self.select_after is None:
            raise ScheduleError("weightlora+ grows at the seam and so needs select_after; give a number or a share")
        return WeightLoRAPlusPolicy(self, adapters, max_steps)


class WeightLoRAPlusPolicy(WeightLoRAPolicy):
    """WeightLoRA's decision, with growth; see :class:`WeightLoRAPlus`."""

    method: WeightLoRAPlus

    def __init__(self, method: WeightLoRAPlus, adapters: tuple[Adapter, ...], max_steps: int) -> None:
        super().__init__(method, adapters, max_steps)
        self.comeback = method.comeback

    def decide(self, omegas: Sequence[float]) -> Decision:
        selection = self._select(omegas)
        return Decision(selection=selection, growth=self._growth(selection))

    def _growth(self, selection: Selection) -> GrowthPlan:
        method = self.method
        by_name = {a.name: a for a in self.adapters}
        kept = [by_name[name] for name in selection.names]
        importance = [c.omega if c.score is None else c.score for c in selection.kept]
        ranks = grown_ranks(
            total_params([a.rank for a in self.adapters], [a.shape for a in self.adapters]),
            [a.shape for a in kept],
            [a.rank for a in kept],
            order=sorted(range(len(kept)), key=lambda i: (-importance[i], i)),
            remainder=method.remainder,
            max_rank=method.max_rank,
        )
        return GrowthPlan(
            ranks={a.name: rank for a, rank in zip(kept, ranks, strict=True)},
            mode=method.growth,
            generator=torch.Generator().manual_seed(method.seed),
            options={"noise": method.noise, "orthonormal": method.orthonormal},
        )
