"""IncreLoRA's ranks: which are live, which learn in reserve, and what each counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightlora.graft import Adapter, RankGates

RESERVE = 1e-5  # E of a rank that learns its direction before it counts


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
