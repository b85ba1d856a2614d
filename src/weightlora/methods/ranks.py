"""What the methods that start with too many ranks and take some away have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from weightlora.core.budget import affordable, rank_for_params
from weightlora.core.triplets import above_smallest
from weightlora.errors import ConfigError, ScheduleError
from weightlora.graft.adapters import Adapter
from weightlora.graft.forms import RankGates
from weightlora.methods.base import Shapes
from weightlora.methods.budgets import SpendingMethod
from weightlora.methods.checks import check_interval, check_warmup
from weightlora.methods.policy import Decision, Factors, Fresh, HeldOut, Policy, Setup, StepView, Weights, lora_params
from weightlora.settings import setting

UNKNOWN = 2**31  # what a loop that does not say how long it is passes for its optimizer steps
R = TypeVar("R", bound="RankMethod")


@dataclass(frozen=True, kw_only=True)
class RankMethod(SpendingMethod):
    """Settings of a method that trains ``init_r`` ranks per adapter and ends with ``target_r`` on average.

    Args:
        target_r: mean rank at the end; None: that of the model as built.
        init_r: rank of every adapter at the start; None: 1.5 times the target, rounded up.
        tinit: steps before the first cut (a count or a share of the run).
        tfinal: steps after the last one.
        deltaT: steps between cuts.
        spend: parameters that the ranks may cost at the end, in place of their number: the last cut keeps the best that
            fit (`--params` sets it).
        shrink: after the last cut take the masked ranks out and go on as plain LoRA; otherwise mask to the end.
        seed: of the initial values.
    """

    chooses_k: ClassVar[bool] = True
    spending: ClassVar[str] = "it starts with more ranks than it ends with"
    in_shares: ClassVar[tuple[str, ...]] = ("tinit", "tfinal", "deltaT")

    target_r: int | None = setting(None, least=1)
    init_r: int | None = setting(None, least=1)
    tinit: int | float = 0.15
    tfinal: int | float = 0.5
    deltaT: int | float = 0.002
    shrink: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_r is not None and self.init_r is not None and self.init_r < self.target_r:
            raise ConfigError(f"init_r={self.init_r} is below target_r={self.target_r}; ranks are only taken away")

    def start_rank(self, target: int) -> int:
        """The rank that an adapter starts with."""
        return math.ceil(1.5 * target) if self.init_r is None else self.init_r

    def within(self: R, params: int, shapes: Shapes, rank: int, kinds: Sequence[str] = ()) -> tuple[R, int]:
        fitting = rank_for_params(params, shapes)
        return replace(self, target_r=None, spend=params), fitting if self.init_r is None else min(fitting, self.init_r)


class RankPolicy(Policy):
    """Rank gates from zero, cuts between tinit and M - tfinal; subclasses say which ranks fall."""

    anew: ClassVar[bool] = False
    remembered: ClassVar[tuple[str, ...]] = ("mask", "alive")

    def __init__(self, method: RankMethod, adapters: tuple[Adapter, ...], max_steps: int) -> None:
        super().__init__(adapters)
        self.settings = method
        targets = [a.rank if method.target_r is None else method.target_r for a in adapters]
        self.ranks = [method.start_rank(target) for target in targets]
        self.setup = Setup(
            ranks=[(rank, self.scale(a, rank)) for a, rank in zip(adapters, self.ranks, strict=True)],
            start=self.prepare,
            form=lambda factors: RankGates(self.ranks, value=0.0, trainable=True, device=factors[0][0].device),
            penalty=self.penalty,
            count=self.count,
        )
        self.start, self.target = sum(self.ranks), sum(targets)
        if self.start < self.target:
            raise ScheduleError(
                f"init_r={method.init_r} is below the mean target rank {self.target / len(adapters):g};"
                " ranks are only taken away: raise init_r or lower target_r"
            )
        if max_steps >= UNKNOWN:
            raise ScheduleError(f"{method.name} counts tfinal from the end of the run; give attach(..., max_steps=N)")
        self.tinit = check_warmup(method.tinit, max_steps, "tinit")
        self.last = max_steps - check_warmup(method.tfinal, max_steps, "tfinal")
        self.interval = check_interval(method.deltaT, max_steps)
        if self.last <= self.tinit:
            raise ScheduleError(
                f"tinit={method.tinit} and tfinal={method.tfinal} leave none of the {max_steps} optimizer steps for"
                " cuts; make them smaller, or train longer"
            )
        self.seam = self.last if method.shrink else None
        self.mask = torch.ones(self.start, dtype=torch.bool)
        self.alive = torch.zeros(self.start, dtype=torch.bool)

    def last_cut(self, scores: Tensor, count: int) -> Tensor:
        """Which ranks live on: all but the `count` with the smallest scores, or the best that the budget pays for."""
        if self.settings.spend is None:
            return above_smallest(scores, count)
        gate = 0 if self.settings.shrink else 1  # it trains to the end
        costs = [
            a.d_in + a.d_out + gate for a, rank in zip(self.adapters, self.ranks, strict=True) for _ in range(rank)
        ]
        order = torch.sort(scores, descending=True, stable=True).indices.tolist()
        keep = torch.zeros_like(scores, dtype=torch.bool)
        keep[affordable(order, costs, self.settings.spend)] = True
        return keep

    @abstractmethod
    def scale(self, adapter: Adapter, rank: int) -> float:
        """PEFT's scale of an adapter that starts with `rank`."""

    @abstractmethod
    def prepare(self, factors: Factors, weights: Weights, held_out: HeldOut | None) -> None:
        """Set initial values."""

    @abstractmethod
    def penalty(self, view: StepView) -> Tensor | None:
        """The regulariser."""

    @abstractmethod
    def cut(self, view: StepView) -> Tensor | None:
        """Which ranks stay after this step, ``(sum r,)`` bool; None: no cut is due. Asked up to the last cut."""

    def observe(self, view: StepView) -> Sequence[Fresh]:
        gates = view.ranks
        keep = self.cut(view) if view.step <= self.last else self.mask.to(gates.values.device)
        if keep is not None:
            gates.set(torch.where(keep, gates.values.detach(), 0.0))
            self.mask = keep
        self.alive = gates.values.detach() != 0
        return ()

    def decide(self, omegas: Sequence[float]) -> Decision:
        counts = [float(part.sum()) for part in self.alive.cpu().split_with_sizes(self.ranks)]
        kept = [i for i, count in enumerate(counts) if count]
        if not kept:
            raise ScheduleError("every rank gate is still 0, so no adapter would be left; train at least one step")
        why = f"{int(sum(counts))} of {self.start} ranks are left, on {len(kept)} of {len(counts)} adapters"
        selection = self.settings.choose(self.adapters, kept, why, step=self.seam, scores=counts)
        return Decision(selection=selection, anew=self.anew)

    def count(self, live: Sequence[Adapter]) -> int:
        # Plain LoRA after the seam; otherwise every rank has trained its gate too.
        return lora_params(live) + (0 if self.settings.shrink else sum(a.rank for a in live))
