"""WeightLoRA: a weight per adapter, the K best kept. WeightLoRA+: the kept ones grow into the parameters set free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from weightlora.core import (
    Growth,
    Noise,
    Remainder,
    Rule,
    Shape,
    coverage,
    credit,
    format_bytes,
    gate_step,
    gradual_k,
    grown_ranks,
    parse_bytes,
    parse_share,
    place,
    rank_for_params,
    support,
    total_params,
)
from weightlora.errors import BudgetError, ConfigError, ScheduleError
from weightlora.graft import Adapter, Selection
from weightlora.methods.base import (
    Budget,
    Factors,
    GrowthPlan,
    Method,
    Policy,
    Room,
    StepView,
    check_choice,
    check_k,
    check_k_value,
    check_warmup,
    with_k,
)
from weightlora.methods.presets import WEIGHTLORA, WEIGHTLORA_PLUS

Score = Literal["omega", "credit", "coverage"]


@dataclass(frozen=True, kw_only=True)
class WeightLoRA(Method):
    """Train all n adapters for T steps, keep K, disconnect the rest, train on.

    ``min over omega, A, B of L(W_i + s omega_i B_i A_i)  subject to  ||omega||_0 <= K``

    Args:
        k: how many adapters live: a count (1..n) or a share of n (0.25). None: a budget decides; without one 0.25.
        memory: instead of k, bytes that the whole run may take ("12GiB"): those survive whose importance is the highest
            in total among all sets that fit. Gates are not projected on the way. Ours, a departure from the paper.
        step_time: instead of k, operations of a step after T as a share of one with all adapters ("0.6x"). Likewise.
        warmup_steps: T in optimizer steps, or a share of the run below 1. None (``official``): gates learn to the end
            and nothing is disconnected before the adapter is saved.
        score: what is ranked at T. "omega": the gate (paper). "credit": the first-order loss decrease that an
            adapter's own updates bought, ``c_i = -sum_t <grad_t, p_(t+1) - p_t>``. "coverage": credit, spread over
            blocks by ``max sum_blocks sqrt(sum c_i)``.
        gate_lr: learning rate of omega's SGD; 0 holds every gate at 1.
        gate_lr_scheduled: multiply ``gate_lr`` by the run's learning-rate schedule.
        rule: which K gates survive a projection (see :func:`weightlora.core.top_k`).
        project_every: project omega every so many steps; None: only at T, and there only if omega is the score.
        k_schedule: how many gates a projection leaves, on the way to T.
        drift: let Adam's momentum and weight decay move adapters whose gate is 0.
        init_A: "lora" (PEFT's scale) or "official" (sqrt(d_in / r) times larger).

    The defaults are the preset ``recommended``; ``WeightLoRA.from_preset("paper", k=10)`` gives another.

    Raises:
        ConfigError: a setting has a value that is not allowed.

    Source: paper, section 3.3; the scores "credit" and "coverage" are ours.

    >>> WeightLoRA(k=10, warmup_steps=100).score
    'credit'
    >>> WeightLoRA.from_preset("paper", k=10).gate_lr
    5.0
    """

    name: ClassVar[str] = "weightlora"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = WEIGHTLORA

    k: int | float | None = None
    memory: str | int | None = None
    step_time: str | None = None
    warmup_steps: int | float | None = 0.15
    score: Score = "credit"
    gate_lr: float = 0.0
    gate_lr_scheduled: bool = False
    rule: Rule = "signed"
    project_every: int | None = None
    k_schedule: Shape = "constant"
    drift: bool = False
    init_A: Literal["lora", "official"] = "lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("score", self.score, get_args(Score))
        check_choice("rule", self.rule, get_args(Rule))
        check_choice("k_schedule", self.k_schedule, get_args(Shape))
        check_choice("init_A", self.init_A, ("lora", "official"))
        if not 0 <= self.gate_lr < math.inf:
            raise ConfigError(f"gate_lr={self.gate_lr} is not usable; use 0 to hold the gates at 1, or a positive rate")
        if self.project_every is not None and self.project_every < 1:
            raise ConfigError(
                f"project_every={self.project_every} is not allowed; use 1 or more, or None for only at T"
            )
        given = [name for name in ("k", "memory", "step_time") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{given[0]} and {given[1]} both say how many adapters live; give one of them")
        if not given:
            object.__setattr__(self, "k", 0.25)
        if self.k is not None:
            check_k_value(self.k)
        if self.memory is not None:
            parse_bytes(self.memory)
        if self.step_time is not None:
            parse_share(self.step_time)
        if self.limit is not None and self.score == "coverage":
            raise ConfigError("score='coverage' is no sum over adapters, as a budget needs; use credit or omega")
        if self.limit is not None and self.warmup_steps is None:
            raise ConfigError(f"{given[0]} limits what runs after the seam, which needs warmup_steps; give some")

    @property
    def limit(self) -> tuple[Literal["memory", "step_time"], float, str] | None:
        if self.memory is not None:
            return "memory", parse_bytes(self.memory), str(self.memory)
        return None if self.step_time is None else ("step_time", parse_share(self.step_time), self.step_time)

    @property
    def copies(self) -> int:
        """Copies of all adapters that a step of warm-up holds: credit compares them before and after it."""
        return 0 if self.score == "omega" else 1

    def within(self, params: int, shapes: Sequence[tuple[int, int]], rank: int) -> tuple[Any, int]:
        if self.limit is not None:
            raise ConfigError(f"params and {self.limit[0]} both say how many adapters live; give one of them")
        return with_k(self, params, shapes, rank)

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> WeightLoRAPolicy:
        return WeightLoRAPolicy(self, adapters, max_steps)


@dataclass(frozen=True, kw_only=True)
class WeightLoRAPlus(WeightLoRA):
    """WeightLoRA, then the survivors' ranks grow until the parameters of all n adapters are spent again.

    ``[B, 0] [A; N] = B A``: the value is preserved and PEFT's scale held, so the loss does not jump.

    Args:
        growth: "gaussian" or "qr" (paper, section 3.4).
        noise: "normal", or the official code's "uniform".
        orthonormal: with "qr", orthonormalise the new directions (the paper prints them raw).
        remainder: "drop" keeps one rank for all (servers want that); "top" hands left-over ranks to the best adapters.
        max_rank: cap on the grown rank (for example 64, a server's limit).
        seed: of the generator that draws new directions.

    Source: paper, section 3.4.
    """

    name: ClassVar[str] = "weightlora+"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = WEIGHTLORA_PLUS
    grows: ClassVar[bool] = True

    growth: Growth = "gaussian"
    noise: Noise = "normal"
    orthonormal: bool = True
    remainder: Remainder = "drop"
    max_rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("growth", self.growth, get_args(Growth))
        check_choice("noise", self.noise, get_args(Noise))
        check_choice("remainder", self.remainder, get_args(Remainder))
        if self.max_rank is not None and self.max_rank < 1:
            raise ConfigError(f"max_rank={self.max_rank} is not allowed; use 1 or more, or None for no cap")

    def within(self, params: int, shapes: Sequence[tuple[int, int]], rank: int) -> tuple[Any, int]:
        # It ends with the parameters of all n, so the budget is theirs; K stays.
        return self, rank_for_params(params, shapes)

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> WeightLoRAPolicy:
        if self.warmup_steps is None:
            raise ScheduleError("weightlora+ grows at the seam and so needs warmup_steps; give a number or a share")
        return WeightLoRAPlusPolicy(self, adapters, max_steps)


class WeightLoRAPolicy(Policy):
    """Gates by StoIHT, credit by inner products; see :class:`WeightLoRA`."""

    def __init__(self, method: WeightLoRA, adapters: tuple[Adapter, ...], max_steps: int) -> None:
        super().__init__(adapters)
        self.method = method
        # Under a budget no count is known before the end of warm-up: nothing is projected on the way there.
        self.k = len(adapters) if method.k is None else check_k(method.k, adapters)
        self.horizon = max_steps if method.warmup_steps is None else check_warmup(method.warmup_steps, max_steps)
        self.seam = None if method.warmup_steps is None else self.horizon
        self.trains_gates = method.gate_lr > 0
        self.gated = self.trains_gates or method.score == "omega"
        if method.score == "omega" and not self.trains_gates and (method.limit or self.k < len(adapters)):
            raise ScheduleError(
                "score='omega' ranks gates that learn; set gate_lr (the paper's code uses 5.0), or keep k=n"
            )
        self.credits = torch.zeros(len(adapters), dtype=torch.float64)
        self._off: list[int] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def prepare(self, factors: Factors, weights: Sequence[Tensor]) -> None:
        if self.method.init_A == "official":
            with torch.no_grad():
                for A, _ in factors:
                    A.mul_((A.shape[1] / A.shape[0]) ** 0.5)

    def before_step(self, view: StepView) -> None:
        if self.method.score != "omega":
            self._before = [(A.detach().clone(), B.detach().clone()) for A, B in view.factors]

    def after_step(self, view: StepView) -> None:
        if self._before:
            gained = []
            for (A, B), (old_A, old_B) in zip(view.factors, self._before, strict=True):
                pairs = [(p.grad, p.detach() - old) for p, old in ((A, old_A), (B, old_B)) if p.grad is not None]
                gained.append(credit([g for g, _ in pairs], [d for _, d in pairs]) if pairs else A.new_zeros(()))
            # One stack on the device; the sum lives there too, so a step never waits for the host.
            self.credits = self.credits.to(gained[0].device) + torch.stack(gained).double()
            self._before = []
        if self.trains_gates:
            self._move_gates(view)

    def _move_gates(self, view: StepView) -> None:
        method, gates = self.method, view.gates
        assert gates is not None
        if gates.omega.grad is None:
            return
        last = view.step == self.horizon
        every = method.project_every
        # At T the score decides: where that is not omega, a projection must not have decided before it.
        project = (last and method.score == "omega") if every is None else (view.step % every == 0 or last)
        k = gradual_k(view.step, self.horizon, len(self.adapters), self.k, method.k_schedule) if project else None
        lr = method.gate_lr * (view.lr_factor if method.gate_lr_scheduled else 1.0)
        gates.set(gate_step(gates.omega.detach(), gates.omega.grad, lr, k, method.rule))
        if (project or method.rule == "positive") and not method.drift:
            self._off = torch.nonzero(gates.omega.detach() == 0).flatten().tolist()

    def held(self) -> Sequence[int]:
        return () if self.method.drift else self._off

    def decide(self, omegas: Sequence[float]) -> Selection:
        method, step = self.method, self.seam
        # An adapter whose gate is 0 contributes nothing and cannot be folded: it is no candidate, whatever its score.
        alive = [i for i, omega in enumerate(omegas) if omega != 0]
        if self.budget is not None and alive:
            return self._within(self.budget, omegas)
        if method.score == "omega":
            best = support(torch.tensor(omegas, dtype=torch.float64), self.k, method.rule)
            alive = [i for i in best if omegas[i] != 0]
        if not alive:
            raise ScheduleError(
                f"all {len(omegas)} gates are zero at the end of warm-up;"
                f" lower gate_lr ({method.gate_lr}) or use rule='signed'"
            )
        if method.score == "omega":
            why = f"the {len(alive)} largest omegas ({method.rule}) after {self.horizon} steps"
            return method.choose(self.adapters, alive, why, step=step, omegas=omegas)
        scores, k = self.credits.tolist(), min(self.k, len(alive))
        if method.score == "credit":
            kept = support(self.credits[alive], k, "signed")
            why = f"the {k} largest credits (loss decrease bought by an adapter's own updates) in {self.horizon} steps"
        else:
            blocks = [-1 if a.block is None else a.block for a in self.adapters]
            kept = coverage([scores[i] for i in alive], [blocks[i] for i in alive], k)
            why = f"credit in {self.horizon} steps, spread over blocks: the {k} that maximise sum of sqrt per block"
        return method.choose(self.adapters, [alive[i] for i in kept], why, step=step, omegas=omegas, scores=scores)

    def _within(self, budget: Budget, omegas: Sequence[float]) -> Selection:
        """The most important set that fits, at the largest micro-batch at which any does."""
        method = self.method
        what = "omega" if method.score == "omega" else "credit"
        scores = list(omegas) if what == "omega" else self.credits.tolist()
        worth = [score if omega != 0 else 0.0 for score, omega in zip(scores, omegas, strict=True)]
        if max(worth) <= 0:
            raise ScheduleError(
                f"no adapter has a positive {what} after {self.horizon} steps, so none is worth its cost;"
                " lower the learning rate, or raise warmup_steps"
            )
        for room in budget.rooms:
            try:
                found = place(worth, room.costs, room.budget)
            except BudgetError:
                if room is budget.rooms[-1]:
                    raise
            else:
                break
        lowest = min(found.chosen, key=lambda i: room.costs.depth[i])
        why = (
            f"the most {what} in {self.horizon} steps within {_words(budget, room)}:"
            f" {len(found.chosen)} of {len(worth)} adapters, which use {found.total / room.budget:.1%} of it;"
            f" backward ends at {self.adapters[lowest].name}"
        )
        shown = None if what == "omega" else scores
        selection = method.choose(self.adapters, found.chosen, why, step=self.seam, omegas=omegas, scores=shown)
        facts: dict[str, Any] = {"kind": budget.kind, "budget": room.budget, "total": found.total}
        facts |= {"depth": found.depth, "importance": found.importance, "micro_batch": room.micro_batch}
        return replace(selection, placement=facts | dict(budget.facts))

    def state(self) -> dict[str, Tensor]:
        return {"credits": self.credits.cpu(), "off": torch.tensor(self._off, dtype=torch.int64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.credits = state["credits"].clone()
        self._off = state["off"].tolist()


def _words(budget: Budget, room: Room) -> str:
    if budget.kind == "memory":
        return f"{format_bytes(room.budget)} of memory at a micro-batch of {room.micro_batch}"
    return f"{room.budget:.4g} operations a step"


class WeightLoRAPlusPolicy(WeightLoRAPolicy):
    """The same decision, with growth; see :class:`WeightLoRAPlus`."""

    method: WeightLoRAPlus

    def growth(self, selection: Selection) -> GrowthPlan:
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
