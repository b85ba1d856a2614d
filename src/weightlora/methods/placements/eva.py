"""EVA: ranks and initial values along the directions that explain most of the inputs' variance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from weightlora.core.published import scaled_ranks
from weightlora.graft.adapters import Adapter
from weightlora.methods.placements.once import SeeingMethod
from weightlora.methods.policy import Decision, Factors, HeldOut, Policy, Setup, Weights
from weightlora.settings import setting


@dataclass(frozen=True, kw_only=True)
class EVA(SeeingMethod):
    """PEFT's EVA, measured and carried out before the first step: ranks go to the directions, over all layers, that
    explain the largest share of their layer's input variance; A starts as these directions, B as 0.

    The sum of the ranks is held, and no adapter gets more than `rho` times its own. Who gets none is removed.

    Args:
        rho: how far ranks may be moved; 1 is not at all.
        batches: held-out batches; they take turns until all directions hold still.
        spend: parameters that the ranks may cost (`--params` sets it): all are made smaller alike where they cost more,
            each layer's best directions staying. None: no matter what.

    Raises:
        ConfigError: a setting has a value that is not allowed; (before training) a batch has too few tokens, or the
            directions do not settle.

    Source: Paischer et al. 2024 (arXiv 2410.07170), by PEFT's own implementation with its defaults (tau 0.99, no
    whitening, scale held). Departs in looking at rows that the run does not train on.

    >>> EVA(rho=1.5).needs.held_out
    8
    """

    name: ClassVar[str] = "eva"
    chooses_k: ClassVar[bool] = True
    spending: ClassVar[str] = "the sum of ranks is held, and wide layers cost more for one"
    presets: ClassVar[dict[str, dict[str, float]]] = {"paper": {"rho": 2.0}, "official": {"rho": 2.0}}

    rho: float = setting(2.0, least=1, use="1 (ranks stay where they are) or more")

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> Policy:
        return EVAPolicy(self, adapters)


class EVAPolicy(Policy):
    """Finds directions where a run begins; see :class:`EVA`."""

    seam = 0

    def __init__(self, method: EVA, adapters: tuple[Adapter, ...]) -> None:
        super().__init__(adapters, Setup(look=self.look, restarts=True))
        self.method = method
        self.directions: list[Tensor] = []

    def look(self, weights: Iterator[Tensor], held_out: HeldOut | None) -> None:
        """Find the directions, and declare the ranks and initial values that follow."""
        assert held_out is not None
        found = held_out.directions(self.method.rho)
        ranks = [len(directions) for directions in found]
        if self.method.spend is not None:
            ranks = scaled_ranks(ranks, [a.shape for a in self.adapters], self.method.spend)
        self.directions = [directions[:rank] for directions, rank in zip(found, ranks, strict=True)]
        # Rank 0 cannot be built: who gets none has one until he is removed.
        setup = [(max(1, rank), a.scale) for rank, a in zip(ranks, self.adapters, strict=True)]
        self.setup = replace(self.setup, ranks=setup, start=self.start)

    def start(self, factors: Factors, weights: Weights, held_out: HeldOut | None) -> None:
        """A along the directions, B at 0."""
        with torch.no_grad():
            for (A, B), directions in zip(factors, self.directions, strict=True):
                if len(directions):
                    A.copy_(directions)
                    B.zero_()

    def decide(self, omegas: Sequence[float]) -> Decision:
        scores = [float(len(directions)) for directions in self.directions]
        kept = [i for i, count in enumerate(scores) if count]
        why = (
            f"{int(sum(scores))} directions of inputs explain most variance; they lie in {len(kept)} of"
            f" {len(scores)} layers"
        )
        return Decision(selection=self.method.choose(self.adapters, kept, why, step=0, scores=scores))
