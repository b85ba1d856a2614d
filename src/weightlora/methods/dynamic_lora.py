"""Dynamic LoRA: ranks whose part in their adapter's update is small fall, slowly first and fast at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weightlora.core.components import component_shares, rising_cuts, unevenness
from weightlora.core.triplets import above_smallest
from weightlora.graft.adapters import Adapter
from weightlora.methods.policy import Factors, HeldOut, StepView, Weights
from weightlora.methods.ranks import RankMethod, RankPolicy
from weightlora.settings import setting


@dataclass(frozen=True, kw_only=True)
class DynamicLoRA(RankMethod):
    """``dW = alpha / r_start * B diag(c) A``; c of the ranks with the smallest share of their adapter is set to 0.

    A and B start uniform with bound ``sqrt(6 / fan_in)``, c as 0. From tinit to M - tfinal, every deltaT steps, the
    ranks with the smallest smoothed share ``S <- beta S + (1 - beta) ||c_i b_i a_i|| / ||B diag(c) A||`` are masked:
    ``(n r_start - n r_target) (p / M_p)^3`` of them, p steps after tinit. Until the last mask they may come back.

    Args:
        beta: smoothing of the share.
        dem_weight: of the mean variance of rows of A and columns of B in the loss, up to the last mask.

    Others: see :class:`RankMethod`. Source: Mao et al. 2024 and its code. Departs: ``shrink`` (recommended) frees the
    masked ranks after the last mask; the regulariser's gradient is added after clipping.

    >>> DynamicLoRA(target_r=8).start_rank(8)
    12
    """

    name: ClassVar[str] = "dynamic_lora"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "recommended": {},
        "paper": {"shrink": False, "deltaT": 100},
        "official": {"shrink": False, "deltaT": 100},
    }

    deltaT: int | float = 0.01
    beta: float = setting(0.9, least=0, below=1, use="0 or more and less than 1, such as 0.9")
    dem_weight: float = setting(0.1, least=0, use="0 or more, such as 0.1")

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> DynamicLoRAPolicy:
        return DynamicLoRAPolicy(self, adapters, max_steps)


class DynamicLoRAPolicy(RankPolicy):
    """Smoothed shares of every rank; see :class:`DynamicLoRA`."""

    remembered: ClassVar[tuple[str, ...]] = ("mask", "alive", "shares")

    def __init__(self, method: DynamicLoRA, adapters: tuple[Adapter, ...], max_steps: int) -> None:
        super().__init__(method, adapters, max_steps)
        self.method = method
        self.shares = torch.zeros(self.start)

    def scale(self, adapter: Adapter, rank: int) -> float:
        return adapter.scale * adapter.rank / rank

    def prepare(self, factors: Factors, weights: Weights, held_out: HeldOut | None) -> None:
        generator = torch.Generator().manual_seed(self.method.seed)
        with torch.no_grad():
            for factor in (f for pair in factors for f in pair):
                bound = (6 / factor.shape[1]) ** 0.5
                factor.copy_(bound * (2 * torch.rand(factor.shape, generator=generator) - 1))

    def penalty(self, view: StepView) -> Tensor | None:
        weight = self.method.dem_weight
        return weight * unevenness(view.factors) if weight and view.step <= self.last else None

    def cut(self, view: StepView) -> Tensor | None:
        beta, gates = self.method.beta, view.ranks
        now = [component_shares(A.detach(), B.detach(), gates.of(i).detach()) for i, (A, B) in enumerate(view.factors)]
        fresh = torch.cat(now)
        self.shares = beta * self.shares.to(fresh) + (1 - beta) * fresh
        p, horizon = view.step - self.tinit, self.last - self.tinit
        if p < 0 or (p % self.interval and p < horizon):
            return None
        fall = rising_cuts(p, horizon, self.start, self.target)
        return self.last_cut(self.shares, fall) if p == horizon else above_smallest(self.shares, fall)
