"""What a WeightLoRA run does: move the gates, add up credit, decide at the seam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from weightlora.core import coverage, credit, format_bytes, gate_step, gradual_k, place, support
from weightlora.errors import BudgetError, ScheduleError
from weightlora.graft import Adapter, Selection, block_numbers
from weightlora.methods.checks import check_k, check_warmup
from weightlora.methods.policy import Budget, Decision, Factors, Fresh, HeldOut, Policy, Room, Setup, StepView, Weights

if TYPE_CHECKING:
    from weightlora.methods.weightlora.settings import WeightLoRA

Score = Literal["omega", "credit", "coverage"]


class WeightLoRAPolicy(Policy):
    """Gates by StoIHT, credit by inner products; see :class:`WeightLoRA`."""

    def __init__(self, method: WeightLoRA, adapters: tuple[Adapter, ...], max_steps: int) -> None:
        learns, ranks_gates = method.gate_lr > 0, method.score == "omega"
        setup = Setup(
            start=enlarge if method.init_A == "official" else None,
            gates="learn" if learns else "set" if ranks_gates else "none",
            compares=not ranks_gates,
        )
        super().__init__(adapters, setup)
        self.method = method
        # Under a budget no count is known before the end of warm-up: nothing is projected on the way there.
        self.k = len(adapters) if method.k is None else check_k(method.k, adapters)
        self.horizon = max_steps if method.select_after is None else check_warmup(method.select_after, max_steps)
        self.seam = None if method.select_after is None else self.horizon
        if ranks_gates and not learns and (method.limit is not None or self.k < len(adapters)):
            raise ScheduleError(
                "score='omega' ranks gates that learn; set gate_lr (the paper's code uses 5.0), or keep k=n"
            )
        self.credits = torch.zeros(len(adapters), dtype=torch.float64)
        self.comeback = True  # whether a gate that was projected to 0 may rise again
        self._out: list[int] = []  # those that may not

    def observe(self, view: StepView) -> Sequence[Fresh]:
        if self.setup.compares:
            gained = []
            for (A, B), (old_A, old_B) in zip(view.factors, view.before, strict=True):
                pairs = [(p.grad, p.detach() - old) for p, old in ((A, old_A), (B, old_B)) if p.grad is not None]
                gained.append(credit([g for g, _ in pairs], [d for _, d in pairs]) if pairs else A.new_zeros(()))
            # One stack on the device; the sum lives there too, so a step never waits for the host.
            self.credits = self.credits.to(gained[0].device) + torch.stack(gained).double()
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
        method, step = self.method, self.seam
        # An adapter whose gate is 0 contributes nothing and cannot be folded: it is no candidate, whatever its score.
        alive = [i for i, omega in enumerate(omegas) if omega != 0]
        if self.budget is not None and alive:
            return self._affordable(self.budget, omegas)
        if method.score == "omega" and alive:
            worth = torch.tensor([omegas[i] for i in alive], dtype=torch.float64)
            alive = [alive[i] for i in support(worth, min(self.k, len(alive)), method.rule)]
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
            blocks = [-1 if block is None else block for block in block_numbers(self.adapters)]
            kept = coverage([scores[i] for i in alive], [blocks[i] for i in alive], k)
            why = f"credit in {self.horizon} steps, spread over blocks: the {k} that maximise sum of sqrt per block"
        return method.choose(self.adapters, [alive[i] for i in kept], why, step=step, omegas=omegas, scores=scores)

    def _affordable(self, budget: Budget, omegas: Sequence[float]) -> Selection:
        """The most important set that the budget allows."""
        what = "omega" if self.method.score == "omega" else "credit"
        scores = list(omegas) if what == "omega" else self.credits.tolist()
        worth = [score if omega != 0 else 0.0 for score, omega in zip(scores, omegas, strict=True)]
        if max(worth) <= 0:
            raise ScheduleError(
                f"no adapter has a positive {what} after {self.horizon} steps, so none is worth its cost;"
                " lower the learning rate, or raise select_after"
            )
        chosen, words, facts = most_important(worth, budget, self.adapters)
        why = f"the most {what} in {self.horizon} steps within {words}"
        shown = None if what == "omega" else scores
        selection = self.method.choose(self.adapters, chosen, why, step=self.seam, omegas=omegas, scores=shown)
        return replace(selection, placement=facts)

    def state(self) -> dict[str, Tensor]:
        off, out = (torch.tensor(found, dtype=torch.int64) for found in (self.held, self._out))
        return {"credits": self.credits.cpu(), "off": off, **({} if self.comeback else {"out": out})}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.credits = state["credits"].clone()
        self.held = state["off"].tolist()
        self._out = [] if self.comeback else state["out"].tolist()


def enlarge(factors: Factors, weights: Weights, held_out: HeldOut | None) -> None:
    """Start as the official code does, with A ``sqrt(d_in / r)`` times larger."""
    with torch.no_grad():
        for A, _ in factors:
            A.mul_((A.shape[1] / A.shape[0]) ** 0.5)


def most_important(
    worth: Sequence[float], budget: Budget, adapters: Sequence[Adapter]
) -> tuple[Sequence[int], str, dict[str, Any]]:
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
    facts: dict[str, Any] = {"kind": budget.kind, "budget": room.budget, "total": found.total}
    facts |= {"depth": found.depth, "importance": found.importance, "micro_batch": room.micro_batch}
    return found.chosen, words, facts | dict(budget.facts)


def _limit(budget: Budget, room: Room) -> str:
    if budget.kind == "memory":
        return f"{format_bytes(room.budget)} of memory at a micro-batch of {room.micro_batch}"
    return f"{room.budget:.4g} operations a step"
