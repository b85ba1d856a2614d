"""How the worth of every adapter is measured up to the seam: one class for each way, the formulas in `core`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from weightlora.core.importance import credit, cross_energy, gate_points, integrated, one_shot, trapezoid
from weightlora.graft.adapters import Adapter
from weightlora.methods.policy import Remembers, StepView, slope

POINTS = 5  # at which gates that rise together are read
Score = Literal["omega", "credit", "next-credit", "trapezoid", "gradient", "cross-gradient", "integrated"]


class Worth(Remembers, ABC):
    """Adds up what steps tell of all n adapters.

    ``copies``: of all adapters that a step holds. ``compares``: needs the factors from before each step. ``holds``:
    adapters must stay as they are initialised while it looks. ``batches``: held-out batches that it looks at, at the
    seam, through gates. ``meaning``: what the score is, in words.
    """

    copies: ClassVar[int] = 0
    compares: ClassVar[bool] = False
    holds: ClassVar[bool] = False
    batches: ClassVar[int] = 0
    meaning: ClassVar[str]

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.n = len(adapters)

    @abstractmethod
    def add(self, view: StepView, *, last: bool) -> None:
        """Look at one step; `last`: at the seam."""

    @abstractmethod
    def scores(self) -> Tensor:
        """(n,) float64; more is better."""


class Credit(Worth):
    """``-sum_t <grad_t, p_(t+1) - p_t>``, gradient and update of the same batch."""

    remembered = ("credits",)
    copies = 1
    compares = True
    meaning = "loss decrease bought by an adapter's own updates"

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        super().__init__(adapters)
        self.credits = torch.zeros(self.n, dtype=torch.float64)

    def add(self, view: StepView, *, last: bool) -> None:
        self._earn(_bought(view, _updates(view)))

    def _earn(self, gained: Tensor) -> None:
        # The sum lives on the device, so a step never waits for the host.
        self.credits = self.credits.to(gained.device) + gained

    def scores(self) -> Tensor:
        return self.credits


class NextCredit(Credit):
    """The same with the gradient of the next batch, at the end of the update: 0 in expectation where all is noise."""

    copies = 2
    meaning = "loss decrease on the next batch, bought by an adapter's own updates"

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        super().__init__(adapters)
        self.updates: list[list[Tensor]] | None = None  # of the step before

    def add(self, view: StepView, *, last: bool) -> None:
        updates = _updates(view)
        if self.updates is not None:
            self._earn(self._mean(view, self.updates))
        self.updates = updates

    def _mean(self, view: StepView, updates: list[list[Tensor]]) -> Tensor:
        return _bought(view, updates)

    def state(self) -> dict[str, Tensor]:
        flat = {} if self.updates is None else {
            f"update.{i}.{j}": part for i, parts in enumerate(self.updates) for j, part in enumerate(parts)
        }  # fmt: skip
        return super().state() | flat

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        if "update.0.0" in state:
            self.updates = [[state[f"update.{i}.{j}"].clone() for j in range(2)] for i in range(self.n)]


class Trapezoid(NextCredit):
    """The mean of both: the line integral of the loss, to third order in the updates."""

    meaning = "loss decrease along an adapter's own updates, by the gradients at both ends"

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        super().__init__(adapters)
        self.own: Tensor | None = None  # what the latest update bought on its own batch

    def add(self, view: StepView, *, last: bool) -> None:
        super().add(view, last=last)
        assert self.updates is not None
        self.own = _bought(view, self.updates)

    def _mean(self, view: StepView, updates: list[list[Tensor]]) -> Tensor:
        after = _bought(view, updates)
        assert self.own is not None
        return trapezoid(self.own.to(after.device), after)

    def state(self) -> dict[str, Tensor]:
        return super().state() | ({} if self.own is None else {"own": self.own.cpu()})

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self.own = state["own"].clone() if "own" in state else None


class Gradient(Worth):
    """``||sum_t dL/dB_t||^2`` at B = 0."""

    holds = True
    meaning = "squared norm of the summed gradient of B, at B = 0"

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        super().__init__(adapters)
        self.sums = [torch.zeros(a.d_out, a.rows) for a in adapters]
        self.energy = torch.zeros(self.n, dtype=torch.float64)
        self.steps = 0

    def add(self, view: StepView, *, last: bool) -> None:
        self.steps += 1
        grads = [torch.zeros_like(B) if B.grad is None else B.grad.detach().float() for _, B in view.factors]
        self.sums = [total.to(grad.device) + grad for total, grad in zip(self.sums, grads, strict=True)]
        energy = torch.stack([one_shot(grad).double() for grad in grads])
        self.energy = self.energy.to(energy.device) + energy

    def scores(self) -> Tensor:
        return torch.stack([one_shot(total / self.steps).double() for total in self.sums]).cpu()

    def state(self) -> dict[str, Tensor]:
        sums = {f"sum.{i}": total.cpu() for i, total in enumerate(self.sums)}
        return {"energy": self.energy.cpu(), "steps": torch.tensor(self.steps), **sums}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.sums = [state[f"sum.{i}"].clone() for i in range(self.n)]
        self.energy, self.steps = state["energy"].clone(), int(state["steps"])


class GradientEnergy(Gradient):
    """``sum_t ||dL_t/dB||^2`` at B = 0: of every batch by itself, so that no two cancel."""

    meaning = "sum over batches of the squared gradient of B, at B = 0"

    def scores(self) -> Tensor:
        return self.energy.cpu()


class CrossGradient(Gradient):
    """``sum_(s != t) <dL/dB_s, dL/dB_t>`` at B = 0: what batches agree on."""

    meaning = "gradient energy of B on which batches agree, at B = 0"

    def scores(self) -> Tensor:
        pairs = zip(self.sums, self.energy.cpu(), strict=True)
        return torch.stack([cross_energy(total.double().cpu(), energy) for total, energy in pairs])


class IntegratedGates(Worth):
    """``-int_0^1 dL/domega_i`` with all gates raised together, on held-out batches, once, at the seam."""

    remembered = ("parts",)
    batches = 8
    meaning = "loss decrease bought by an adapter, with all gates raised from 0 to 1"

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        super().__init__(adapters)
        self.parts = torch.zeros(self.n, dtype=torch.float64)

    def add(self, view: StepView, *, last: bool) -> None:
        if not last:
            return
        assert view.gates is not None
        assert view.held_out is not None
        gates, held_out = view.gates, view.held_out
        before = gates.omega.detach().clone()
        points, weights = gate_points(POINTS)
        gradients = []
        for point in points:
            gates.set(before * point)
            slopes = [slope(held_out, index, gates.omega) for index in range(len(held_out))]
            gradients.append(torch.stack(slopes).double().mean(0) * before.double())
        gates.set(before)
        self.parts = integrated(gradients, weights).cpu()

    def scores(self) -> Tensor:
        return self.parts


WORTHS: Mapping[str, type[Worth]] = {
    "credit": Credit,
    "next-credit": NextCredit,
    "trapezoid": Trapezoid,
    "gradient": Gradient,
    "cross-gradient": CrossGradient,
    "integrated": IntegratedGates,
}
"""By the name of the score; omega is no sum over steps, and is read from the gates."""


def _updates(view: StepView) -> list[list[Tensor]]:
    pairs = zip(view.factors, view.before, strict=True)
    return [[now.detach() - old for now, old in zip(own, before, strict=True)] for own, before in pairs]


def _bought(view: StepView, updates: list[list[Tensor]]) -> Tensor:
    """``-<grad, update>`` of every adapter with this step's gradients, (n,) float64."""
    gained = []
    for factors, parts in zip(view.factors, updates, strict=True):
        found = [(p.grad, part) for p, part in zip(factors, parts, strict=True) if p.grad is not None]
        gained.append(credit([g for g, _ in found], [d for _, d in found]) if found else factors[0].new_zeros(()))
    return torch.stack(gained).double()
