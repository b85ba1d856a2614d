"""IncreLoRA: every adapter starts with one rank; those that matter most to the loss get more, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weightlora.core.triplets import orthogonality, smooth_sensitivity
from weightlora.errors import ScheduleError
from weightlora.graft.adapters import Adapter
from weightlora.graft.forms import Form, RankGates
from weightlora.methods.budgets import SpendingMethod
from weightlora.methods.checks import check_interval, check_k, check_warmup
from weightlora.methods.policy import Decision, Factors, Fresh, HeldOut, Policy, Setup, StepView, Weights, lora_params
from weightlora.settings import setting

RESERVE = 1e-5  # E of a rank that learns its direction before it counts


@dataclass(frozen=True, kw_only=True)
class IncreLoRA(SpendingMethod):
    """``dW = alpha / (ranknum + 1e-5) * P diag(E) Q`` with a ranknum that grows where the loss asks for it.

    Each adapter has one live rank (E = 0, learning) and a reserve of `incre_rank_num` (P and Q learn, E fixed at
    1e-5). At every multiple of `incre_interval` above `init_warmup` the `top_h` adapters with the largest score
    ``Ibar * U`` of ``I = sum |dW * dL/ddW| / sqrt(numel)`` take their reserve into use, until n r ranks are live.

    Args:
        incre_rank_num: ranks that an adapter gains at a time; None: half the model's rank.
        top_h: adapters that grow at a time, a count or a share of n.
        init_warmup, incre_interval: steps, or shares of the run.
        beta1, beta2: smoothing of the score and of its uncertainty.
        orth_reg_weight: of the mean ``||P^T P - I||_F`` and ``||Q Q^T - I||_F`` over live and reserve ranks.
        spend: parameters that live ranks may cost, in place of n r ranks; the last round spends what is left
            (`--params` sets it).
        shrink: at the last growth go on as plain LoRA; otherwise with E to the end.
        seed: of the initial values, N(0, 0.02).

    Source: IncreLoRA (Zhang et al. 2023) and its code. Departs: growth comes after the optimizer's step; micro-batches
    add up in the score; ties go to the earlier adapter; the last round is cut to what is left of the budget.
    """

    name: ClassVar[str] = "increlora"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "recommended": {},
        "paper": {"shrink": False},
        "official": {"shrink": False},
    }
    chooses_k: ClassVar[bool] = True
    spending: ClassVar[str] = "while it grows every adapter has a reserve of ranks that learn too"
    in_shares: ClassVar[tuple[str, ...]] = ("init_warmup", "incre_interval")
    in_counts: ClassVar[tuple[str, ...]] = ("top_h",)

    incre_rank_num: int | None = setting(None, least=1)
    top_h: int | float = 0.2
    init_warmup: int | float = 0.02
    incre_interval: int | float = 0.02
    beta1: float = setting(0.85, above=0, below=1, use="a number between 0 and 1 such as 0.85")
    beta2: float = setting(0.85, above=0, below=1, use="a number between 0 and 1 such as 0.85")
    orth_reg_weight: float = setting(0.1, least=0, use="0 or more, such as 0.1")
    shrink: bool = True
    seed: int = 0

    def step_of(self, rank: float) -> int:
        """Ranks that an adapter gains at a time, where the mean target is `rank`."""
        return max(1, int(rank) // 2) if self.incre_rank_num is None else self.incre_rank_num

    def most(self, target: int, n: int, top_h: int) -> int:
        """The most ranks that one adapter can reach."""
        add = self.step_of(target / n)
        return min(1 + math.ceil((target - n) / (top_h * add)) * add, target - n + 1)

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> IncreLoRAPolicy:
        return IncreLoRAPolicy(self, adapters, max_steps)


class GrowingGates(RankGates):
    """E, divided by the number of live ranks: ``dW = s B diag(E r / (ranknum + 1e-5)) A`` with ``s r = alpha``."""

    def __init__(self, ranks: Sequence[int], device: torch.device) -> None:
        super().__init__(ranks, value=0.0, trainable=True, device=device)
        self.factor = torch.ones(len(ranks), dtype=torch.float32, device=device)

    def constants(self) -> dict[str, Tensor]:
        return super().constants() | {"factor": self.factor}

    def of(self, index: int) -> Tensor:
        return super().of(index) * self.factor[index]


class RankPool:
    """The ranks of all adapters: in each one the first are live, the next are in reserve, the rest is unused.

    Args:
        adapters: all n.
        costs, budget: of a live rank of each adapter, and what all may cost; ones and the ranks in all, to count ranks.
        add: ranks in reserve, which go live together.
        most: ranks allocated for each adapter.
        seed: of their initial values.
    """

    def __init__(
        self, adapters: Sequence[Adapter], *, costs: Sequence[int], budget: int, add: int, most: int, seed: int
    ) -> None:
        self.adapters, self.costs, self.budget = adapters, costs, budget
        self.add, self.most, self.seed = add, most, seed
        self.closed = False  # after the last round, whatever it has left
        self.ranks = [1] * len(adapters)
        self.alive = torch.zeros(len(adapters) * most, dtype=torch.bool)

    @property
    def left(self) -> int:
        """What live ranks may still cost."""
        return self.budget - sum(live * cost for live, cost in zip(self.ranks, self.costs, strict=True))

    @property
    def complete(self) -> bool:
        """Whether no rank can be added any more; then nothing is in reserve."""
        return self.closed or self.left < min(self.costs)

    def used(self) -> list[int]:
        """Live and reserve ranks of every adapter."""
        return [live if self.complete else min(live + self.add, self.most) for live in self.ranks]

    def live(self) -> list[list[int]]:
        """Ranks of every adapter that have moved away from E = 0."""
        return [torch.nonzero(part).flatten().tolist() for part in self.alive.cpu().view(-1, self.most)]

    def draw(self, index: int, pair: tuple[Tensor, Tensor], ranks: Sequence[int]) -> None:
        """New directions for some ranks of an adapter; they depend on the seed, the adapter and the rank alone."""
        A, B = pair
        with torch.no_grad():
            for rank in ranks:
                generator = torch.Generator().manual_seed(self.seed + 7919 * (index * self.most + rank))
                A[rank] = 0.02 * torch.randn(A.shape[1], generator=generator)
                B[:, rank] = 0.02 * torch.randn(B.shape[0], generator=generator)

    def grow(self, index: int, pair: tuple[Tensor, Tensor]) -> tuple[range, range]:
        """Take an adapter's reserve into use and draw another; the ranks that went live, and those now in reserve."""
        before, live = self.used()[index], self.ranks[index]
        self.ranks[index] += min(self.add, self.left // self.costs[index], self.most - live)
        taken, reserve = range(live, self.ranks[index]), range(before, self.used()[index])
        self.draw(index, pair, reserve)
        return taken, reserve

    def arrange(self, gates: GrowingGates) -> None:
        """Open the live ranks, hold the reserve at 1e-5 (decay would move it) and the rest at 0."""
        slot = torch.arange(self.most, device=gates.values.device).repeat(len(self.adapters))
        live = torch.tensor(self.ranks, device=slot.device)[gates.owner]
        used = torch.tensor(self.used(), device=slot.device)[gates.owner]
        gates.open.copy_(slot < live)
        closed = torch.where(slot < used, RESERVE, 0.0)
        started = self.alive.to(slot.device)
        values = torch.where(gates.open, torch.where(started | (slot == 0), gates.values.detach(), RESERVE), closed)
        gates.set(values)
        self.alive = gates.open & (values != 0)
        numbers = zip(self.adapters, self.ranks, strict=True)
        factors = [a.rank / (live + 1e-5) for a, live in numbers]
        gates.factor.copy_(torch.tensor(factors, dtype=torch.float64))


class IncreLoRAPolicy(Policy):
    """Allocates what an adapter can reach at most, and opens ranks; see :class:`IncreLoRA`."""

    def __init__(self, method: IncreLoRA, adapters: tuple[Adapter, ...], max_steps: int) -> None:
        super().__init__(adapters)
        self.method, n = method, len(adapters)
        self.target = sum(a.rank for a in adapters)
        self.top_h = check_k(method.top_h, adapters)
        self.add = method.step_of(self.target / n)
        self.interval = check_interval(method.incre_interval, max_steps, "incre_interval")
        first = check_warmup(method.init_warmup, max_steps, "init_warmup") // self.interval + 1
        rounds = math.ceil((self.target - n) / (self.top_h * self.add))
        self.first, self.last = first * self.interval, (first + rounds - 1) * self.interval
        if rounds and self.last >= max_steps:
            raise ScheduleError(
                f"increlora needs {rounds} rounds of growth, the last at step {self.last} of {max_steps}; lower"
                " incre_interval or init_warmup, raise top_h or incre_rank_num, or train longer"
            )
        self.seam = self.last if method.shrink and rounds else None
        self.most = method.most(self.target, n, self.top_h)
        self.setup = Setup(
            ranks=[(self.most, a.scale) for a in adapters],
            start=self._start,
            form=self._form,
            penalty=self._penalty,
            count=lambda live: lora_params(live) + (0 if method.shrink else sum(a.rank for a in live)),
        )
        self.watches = rounds > 0
        gate = 0 if method.shrink else 1  # it trains to the end
        costs = [1 if method.spend is None else a.d_in + a.d_out + gate for a in adapters]
        budget = self.target if method.spend is None else method.spend
        self.pool = RankPool(adapters, costs=costs, budget=budget, add=self.add, most=self.most, seed=method.seed)
        self.trained = 0  # numbers in ranks that were live or in reserve, at the most
        self.stats = torch.zeros(2, n, dtype=torch.float64)

    def _form(self, factors: Factors) -> Form:
        gates = GrowingGates([self.most] * len(factors), factors[0][0].device)
        self.pool.arrange(gates)
        return gates

    def _start(self, factors: Factors, weights: Weights, held_out: HeldOut | None) -> None:
        for index, pair in enumerate(factors):
            self.pool.draw(index, pair, range(self.most))

    def _penalty(self, view: StepView) -> Tensor | None:
        weight = self.method.orth_reg_weight
        pairs = zip(view.factors, self.pool.used(), strict=True)
        return weight * orthogonality([(A[:m], B[:, :m]) for (A, B), m in pairs]) if weight else None

    def observe(self, view: StepView) -> Sequence[Fresh]:
        gates, fresh = view.ranks, []
        assert isinstance(gates, GrowingGates)
        if not self.pool.complete:
            assert view.products is not None
            sizes = torch.tensor([a.d_in * a.d_out for a in self.adapters], dtype=torch.float64)
            score = view.products.cpu().double() / sizes.sqrt()
            old = self.stats[0], self.stats[1]
            self.stats = torch.stack(
                smooth_sensitivity(score, torch.ones_like(score), *old, self.method.beta1, self.method.beta2)
            )
            self.trained = max(self.trained, self._training())
            if view.step >= self.first and view.step % self.interval == 0:
                fresh = self._grow(view)
        self.watches = not self.pool.complete
        self.pool.arrange(gates)
        return fresh

    def _grow(self, view: StepView) -> list[Fresh]:
        order = torch.sort(self.stats[0] * self.stats[1], descending=True, stable=True).indices.tolist()
        last, fresh = view.step >= self.last, []
        for index in order if last else order[: self.top_h]:
            taken, reserve = self.pool.grow(index, view.factors[index])
            fresh += [Fresh(index=index, ranks=tuple(taken), gates_only=True)] if taken else []
            fresh += [Fresh(index=index, ranks=tuple(reserve))] if reserve else []
        self.pool.closed = last
        return fresh

    def _training(self) -> int:
        """Numbers in the ranks that learn now."""
        counts = zip(self.adapters, self.pool.used(), self.pool.ranks, strict=True)
        return sum(used * (a.d_in + a.d_out) + live for a, used, live in counts)

    def decide(self, omegas: Sequence[float]) -> Decision:
        counts = [float(len(ranks)) for ranks in self.pool.live()]
        kept = [i for i, count in enumerate(counts) if count]
        if not kept:
            raise ScheduleError("every rank's E is still 0, so no adapter would be left; train at least one step")
        aim = f"a target of {self.target}" if self.method.spend is None else f"{self.method.spend} parameters"
        why = f"{int(sum(counts))} ranks of {aim} are live, {int(max(counts))} on the most important"
        selection = self.method.choose(self.adapters, kept, why, step=self.seam, scores=counts)
        # What the optimizer remembers is mostly the regulariser's gradient, as with AdaLoRA.
        peak = max(self.trained, self._training())
        return Decision(selection=selection, live=self.pool.live(), anew=True, peak=peak)

    def state(self) -> dict[str, Tensor]:
        numbers = {"closed": torch.tensor(self.pool.closed), "trained": torch.tensor(self.trained)}
        return {"live_ranks": torch.tensor(self.pool.ranks), "stats": self.stats, "alive": self.pool.alive, **numbers}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.pool.ranks = state["live_ranks"].tolist()
        self.stats, self.pool.alive = state["stats"].clone(), state["alive"].clone()
        self.pool.closed, self.trained = bool(state["closed"]), int(state["trained"])
