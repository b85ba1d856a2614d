"""GoRA: ranks in proportion to what the loss would feel if a weight were gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from weightlora.core.published import proportional_ranks, sensitivity
from weightlora.graft.adapters import Adapter
from weightlora.graft.watch import dense_gradients
from weightlora.methods.placements.once import SeeingMethod
from weightlora.methods.policy import Decision, HeldOut, Policy, Setup


@dataclass(frozen=True, kw_only=True)
class GoRA(SeeingMethod):
    """``I_i = mean |W_i * dL/dW_i|`` before the first step; ranks follow it, and all adapters live.

    ``r_i = round(b I_i / (sum I sqrt(d_in + d_out)))``, ``b = sum sqrt(d_in + d_out) r``, not below r / 2 nor above
    4 r. The gradient is the mean over all batches; its sums lie in the host's memory, 4 bytes for each entry of every
    adapted weight.

    Args:
        batches: held-out batches that are looked at.
        spend: parameters that the ranks may cost (`--params` sets it): b is made smaller or larger for them. None: b as
            above.
        seed: of the initial values.

    Raises:
        ConfigError: a setting has a value that is not allowed.

    Source: He et al. 2025, "GoRA" (arXiv 2502.12171), equations 5 to 7. Departs in the initial values, which are
    LoRA's (theirs compress the gradient into B: 72.9 on GSM8K by their own ablation, 72.5 without), and in
    that the scale of an adapter stays what it was for rank r.

    >>> GoRA(batches=4).needs.held_out
    4
    """

    name: ClassVar[str] = "gora"
    presets: ClassVar[dict[str, dict[str, int]]] = {"paper": {"batches": 64}, "official": {"batches": 64}}

    seed: int = 0

    def begin(self, adapters: tuple[Adapter, ...], max_steps: int) -> Policy:
        return GoRAPolicy(self, adapters)


class GoRAPolicy(Policy):
    """Hands ranks out where a run begins; see :class:`GoRA`."""

    seam = 0

    def __init__(self, method: GoRA, adapters: tuple[Adapter, ...]) -> None:
        super().__init__(adapters, Setup(look=self.look, restarts=True))
        self.method = method
        self.importance: list[float] = []

    def look(self, weights: Iterator[Tensor], held_out: HeldOut | None) -> None:
        """Measure, and declare the ranks that follow."""
        assert held_out is not None
        sums = [torch.zeros(a.d_out, a.d_in) for a in self.adapters]

        def see(index: int, gradient: Tensor) -> None:
            sums[index] += gradient.cpu()

        for index in range(len(held_out)):
            held_out.watch(index, partial(dense_gradients, see=see), backward=True)
        pairs = zip(weights, sums, strict=True)
        self.importance = [float(sensitivity(W.cpu(), G / len(held_out))) for W, G in pairs]
        shapes, ranks = [a.shape for a in self.adapters], [a.rank for a in self.adapters]
        found = proportional_ranks(self.importance, shapes, ranks, self.method.spend)
        setup = [(rank, a.scale) for rank, a in zip(found, self.adapters, strict=True)]
        self.setup = replace(self.setup, ranks=setup)

    def decide(self, omegas: Sequence[float]) -> Decision:
        n, ranks = len(self.adapters), [rank for rank, _ in self.setup.ranks]
        why = f"all {n} live, with ranks {min(ranks)} to {max(ranks)} in proportion to |W * dL/dW|"
        selection = self.method.choose(self.adapters, range(n), why, step=0, scores=self.importance)
        return Decision(selection=selection, restart=torch.Generator().manual_seed(self.method.seed))
