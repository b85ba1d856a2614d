"""What a WeightLoRA run does: move the gates, add up credit, decide at the seam."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightlora.core.gates import gate_step, gradual_k
from weightlora.core.importance import coverage, holding
from weightlora.core.placement import place
from weightlora.core.projection import support
from weightlora.core.sizes import format_bytes
from weightlora.errors import BudgetError, ConfigError, ScheduleError
from weightlora.graft.adapters import Adapter, block_numbers
from weightlora.graft.selection import Selection
from weightlora.methods.checks import check_k, check_select_after
from weightlora.methods.policy import Budget, Decision, Factors, Fresh, HeldOut, Policy, Room, Setup, StepView, Weights
from weightlora.methods.weightlora.worth import WORTHS

if TYPE_CHECKING:
    from weightlora.methods.weightlora.settings import WeightLoRA


QUARTER = 0.25  # of the adapters live where nothing else says how many


class WeightLoRAPolicy(Policy):
    """Gates by StoIHT, worth by what steps tell; see :class:`WeightLoRA`."""

    def __init__(self, method: WeightLoRA, adapters: tuple[Adapter, ...], max_steps: int) -> None:
        self.worth = None if method.score == "omega" else WORTHS[method.score](adapters)
        learns, looks = method.gate_lr > 0, self.worth is not None and self.worth.batches > 0
        setup = Setup(
            start=enlarge if method.init_A == "official" else None,
            gates="learn" if learns else "set" if looks or self.worth is None else "none",
            compares=self.worth is not None and self.worth.compares,
        )
        super().__init__(adapters, setup)
        self.method = method
        # Under a budget no count is known before the end of warm-up: nothing is projected on the way there.
        self.k = len(adapters) if method.k is None else check_k(method.k, adapters)
        self.horizon = max_steps if method.select_after is None else check_select_after(method.select_after, max_steps)
        self.seam = None if method.select_after is None else self.horizon
        if self.worth is None and not learns and (method.k is None or self.k < len(adapters)):
            raise ScheduleError(
                "score='omega' ranks gates that learn; set gate_lr (the paper's code uses 5.0), or keep k=n"
            )
        if self.worth is not None and self.worth.holds:
            self.held = range(len(adapters))
        self.comeback = True  # whether a gate that was projected to 0 may rise again
        self._out: list[int] = []  # those that may not

    def observe(self, view: StepView) -> Sequence[Fresh]:
        if self.worth is not None:
            self.worth.add(view, last=view.step == self.horizon)
        if self.setup.gates == "learn":
            self._move_gates(view)
        return ()

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
        if not (math.isfinite(lr) and lr >= 0):  # as the user's scheduler has made it
            raise ConfigError(f"gate lr={lr} is not usable; it must be a finite number >= 0")
        omega, grad = gates.omega.detach().clone(), gates.omega.grad
        if self._out:
            inside = [i for i in range(len(self.adapters)) if i not in self._out]
            omega[inside] = gate_step(omega[inside], grad[inside], lr, k, method.rule)
        else:
            omega = gate_step(omega, grad, lr, k, method.rule)
        gates.set(omega)
        if project and not self.comeback:
            self._out = torch.nonzero(omega == 0).flatten().tolist()
        if (project or method.rule == "positive") and not method.drift:
            self.held = torch.nonzero(gates.omega.detach() == 0).flatten().tolist()

    def decide(self, omegas: Sequence[float]) -> Decision:
        return Decision(selection=self._select(omegas))

    def _select(self, omegas: Sequence[float]) -> Selection:
        method = self.method
        # An adapter whose gate is 0 contributes nothing and cannot be folded: it is no candidate, whatever its score.
        alive = [i for i, omega in enumerate(omegas) if omega != 0]
        if not alive:
            raise ScheduleError(
                f"all {len(omegas)} gates are zero at the end of warm-up;"
                f" lower gate_lr ({method.gate_lr}) or use rule='signed'"
            )
        scores = list(omegas) if self.worth is None else self.worth.scores().tolist()
        found = [scores[i] for i in alive]
        facts: dict[str, object] | None = None
        if self.budget is not None:
            kept, why, facts = self._affordable(self.budget, found, alive)
        elif method.share is not None:
            chosen = holding(found, method.share)
            kept, why = [alive[i] for i in chosen], f"the {len(chosen)} that hold {method.share:g} of all {self._what}"
        else:
            k = check_k(QUARTER, self.adapters) if method.k is None else self.k
            chosen, why = self._most(found, alive, min(k, len(alive)))
            kept = [alive[i] for i in chosen]
        selection = method.choose(
            self.adapters, kept, why, step=self.seam, omegas=omegas, scores=None if self.worth is None else scores
        )
        return selection if facts is None else replace(selection, placement=facts)

    def _most(self, found: Sequence[float], alive: Sequence[int], k: int) -> tuple[list[int], str]:
        """The k best of those alive, and why."""
        method = self.method
        if method.coverage:
            blocks = [-1 if block is None else block for block in block_numbers(self.adapters)]
            why = f"{self._what}, spread over blocks: the {k} that maximise sum of sqrt per block"
            return coverage(found, [blocks[i] for i in alive], k), why
        rule = method.rule if self.worth is None else "signed"
        kept = support(torch.tensor(found, dtype=torch.float64), k, rule)
        if self.worth is None:
            return kept, f"the {len(kept)} largest omegas ({method.rule}) after {self.horizon} steps"
        return kept, f"the {k} with the largest {self._what}"

    @property
    def _what(self) -> str:
        if self.worth is None:
            return f"omega in {self.horizon} steps"
        return f"{self.method.score} ({self.worth.meaning}) in {self.horizon} steps"

    def _affordable(
        self, budget: Budget, found: Sequence[float], alive: Sequence[int]
    ) -> tuple[list[int], str, dict[str, object]]:
        """The most important set that the budget allows."""
        worth = [0.0] * len(self.adapters)
        for i, score in zip(alive, found, strict=True):
            worth[i] = score
        if max(worth) <= 0:
            raise ScheduleError(
                f"no adapter has a positive {self.method.score} score after {self.horizon} steps, so none is"
                " worth its cost; lower the learning rate, or raise select_after"
            )
        chosen, words, facts = most_important(worth, budget, self.adapters)
        return list(chosen), f"the most {self._what}, within {words}", facts

    def state(self) -> dict[str, Tensor]:
        off, out = (torch.tensor(list(found), dtype=torch.int64) for found in (self.held, self._out))
        measured = {} if self.worth is None else self.worth.state()
        return {**measured, "off": off, **({} if self.comeback else {"out": out})}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if self.worth is not None:
            self.worth.load_state(state)
        self.held = state["off"].tolist()
        self._out = [] if self.comeback else state["out"].tolist()


def enlarge(factors: Factors, weights: Weights, held_out: HeldOut | None) -> None:
    """Start as the official code does, with A ``sqrt(d_in / r)`` times larger."""
    with torch.no_grad():
        for A, _ in factors:
            A.mul_((A.shape[1] / A.shape[0]) ** 0.5)


def most_important(
    worth: Sequence[float], budget: Budget, adapters: Sequence[Adapter]
) -> tuple[Sequence[int], str, dict[str, object]]:
    """The set with the highest total worth among all that fit, at the largest micro-batch at which any does.

    Args:
        worth: of every adapter, in the order of `adapters`; those at or below zero are not chosen.
        budget: what survivors may cost.
        adapters: all n.

    Returns:
        Indices to keep, the budget in words, and the facts that belong into the selection's record.

    Raises:
        BudgetError: not even one adapter fits at the smallest micro-batch.
    """
    for room in budget.rooms:
        try:
            found = place(worth, room.costs, room.budget)
        except BudgetError:
            if room is budget.rooms[-1]:
                raise
        else:
            break
    lowest = min(found.chosen, key=lambda i: room.costs.depth[i])
    words = (
        f"{_limit(budget, room)}: {len(found.chosen)} of {len(worth)} adapters,"
        f" which use {found.total / room.budget:.1%} of it; backward ends at {adapters[lowest].name}"
    )
    facts: dict[str, object] = {"kind": budget.kind, "budget": room.budget, "total": found.total}
    facts |= {"depth": found.depth, "importance": found.importance, "micro_batch": room.micro_batch}
    return found.chosen, words, facts | dict(budget.facts)


def _limit(budget: Budget, room: Room) -> str:
    of = {"memory": "of memory", "kept": "kept for backward"}.get(budget.kind)
    if of:
        return f"{format_bytes(room.budget)} {of} at a micro-batch of the {room.micro_batch} longest rows"
    return f"{room.budget:.4g} operations a step"
