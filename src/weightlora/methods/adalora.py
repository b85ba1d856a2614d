"""AdaLoRA: triplets of a column, a number and a row compete for a shrinking budget by sensitivity and uncertainty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weightlora.core.triplets import above_smallest, cubic_budget, orthogonality, smooth_sensitivity, triplet_scores
from weightlora.graft.adapters import Adapter
from weightlora.methods.policy import Factors, HeldOut, StepView, Weights
from weightlora.methods.ranks import RankMethod, RankPolicy
from weightlora.settings import setting


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(RankMethod):
    """``dW = alpha / (init_r + 1e-5) * P diag(E) Q``; E of the ranks that matter least is set to 0.

    P and Q start as N(0, 0.02), E as 0. Between tinit and M - tfinal the budget falls along a cubic from n init_r to
    n target_r; every deltaT steps the ranks with the smallest triplet scores are masked (they keep learning, and may
    come back at the next mask).

    Args:
        beta1, beta2: smoothing of sensitivity and uncertainty.
        orth_reg_weight: of the mean ``||P^T P - I||_F`` and ``||Q Q^T - I||_F`` in the loss.

    Others: see :class:`RankMethod`. Source: Zhang et al. 2023 and its code. Departs: ``shrink`` (recommended) frees
    the masked ranks at M - tfinal, from where on the regulariser is off too; the regulariser's gradient is added
    after clipping.

    >>> AdaLoRA(target_r=2, tinit=100).start_rank(2)
    3
    """

    name: ClassVar[str] = "adalora"
    rate: ClassVar[float] = 3.0  # measured; see docs/methods.md
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "recommended": {},
        "paper": {"shrink": False},
        "official": {"shrink": False},  # its schedules are steps, task by task; the shares are ours
    }

    beta1: float = setting(0.85, above=0, below=1, use="a number between 0 and 1 such as 0.85")
    beta2: float = setting(0.85, above=0, below=1, use="a number between 0 and 1 such as 0.85")
    orth_reg_weight: float = setting(0.1, least=0, use="0 or more, such as 0.1")

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> AdaLoRAPolicy:
        return AdaLoRAPolicy(self, adapters, max_steps)


class AdaLoRAPolicy(RankPolicy):
    """Statistics of every entry of E, Q and P; see :class:`AdaLoRA`."""

    # The regulariser's gradient does not shrink with E as the loss's does: it is most of what Adam remembers of P and
    # Q, and would hold the survivors back for as long as second moments last.
    anew: ClassVar[bool] = True

    def __init__(self, method: AdaLoRA, adapters: tuple[Adapter, ...], max_steps: int) -> None:
        super().__init__(method, adapters, max_steps)
        self.method = method
        shapes = [torch.Size([self.start])]
        for adapter, rank in zip(adapters, self.ranks, strict=True):
            shapes += [torch.Size([rank, adapter.d_in]), torch.Size([adapter.d_out, rank])]
        self.stats = [(torch.zeros(shape), torch.zeros(shape)) for shape in shapes]  # (Ibar, U) of E, Q0, P0, Q1, ...

    def scale(self, adapter: Adapter, rank: int) -> float:
        return adapter.scale * adapter.rank / (rank + 1e-5)

    def prepare(self, factors: Factors, weights: Weights, held_out: HeldOut | None) -> None:
        generator = torch.Generator().manual_seed(self.method.seed)
        with torch.no_grad():
            for factor in (f for pair in factors for f in pair):
                factor.copy_(0.02 * torch.randn(factor.shape, generator=generator))

    def penalty(self, view: StepView) -> Tensor | None:
        weight = self.method.orth_reg_weight
        return weight * orthogonality(view.factors) if weight else None

    def cut(self, view: StepView) -> Tensor | None:
        if view.step < self.last:
            self._measure(view)
        due = view.step == self.last or (view.step > self.tinit and view.step % self.interval == 0)
        if not due:
            return None
        fall = self.start - cubic_budget(view.step, self.start, self.target, self.tinit, self.last)
        scores = self.scores()
        return self.last_cut(scores, fall) if view.step == self.last else above_smallest(scores, fall)

    def _measure(self, view: StepView) -> None:
        tensors = [view.ranks.values, *(factor for pair in view.factors for factor in pair)]
        for index, (tensor, (mean, spread)) in enumerate(zip(tensors, self.stats, strict=True)):
            grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            old = mean.to(tensor.device), spread.to(tensor.device)
            beta1, beta2 = self.method.beta1, self.method.beta2
            self.stats[index] = smooth_sensitivity(tensor.detach(), grad, *old, beta1, beta2)

    def scores(self) -> Tensor:
        """The triplet score of every rank, ``(sum r,)``."""
        gates, *entries = [mean * spread for mean, spread in self.stats]
        parts = zip(gates.split_with_sizes(self.ranks), entries[::2], entries[1::2], strict=True)
        return torch.cat([triplet_scores(*part) for part in parts])

    def state(self) -> dict[str, Tensor]:
        means = {f"mean.{i}": mean for i, (mean, _) in enumerate(self.stats)}
        return super().state() | means | {f"spread.{i}": spread for i, (_, spread) in enumerate(self.stats)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self.stats = [(state[f"mean.{i}"].clone(), state[f"spread.{i}"].clone()) for i in range(len(self.stats))]
