"""Methods that spend a budget of parameters on adapters or on ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch

from weightlora.core.budget import grown_ranks, k_for_params, rank_for_params
from weightlora.graft.adapters import Adapter
from weightlora.methods.base import AdapterMethod, Needs, Shapes
from weightlora.methods.policy import GrowthPlan
from weightlora.settings import setting

ANY_K = "K is such that any K adapters fit, the largest too"  # of methods that choose K adapters of one rank
K = TypeVar("K", bound="CountMethod")
S = TypeVar("S", bound="SpendingMethod")


@dataclass(frozen=True, kw_only=True)
class CountMethod(AdapterMethod):
    """Settings of a method that keeps `k` adapters as they are: a count, or as a float a share of all n."""

    spending: ClassVar[str] = ANY_K
    in_counts: ClassVar[tuple[str, ...]] = ("k",)

    k: int | float = 0.25

    @property
    def needs(self) -> Needs:
        return Needs(k=self.k)

    def within(self: K, params: int, shapes: Shapes, rank: int, kinds: Sequence[str] = ()) -> tuple[K, int]:
        # The largest K such that any K adapters stay within the budget; the rank is kept.
        return replace(self, k=k_for_params(params, rank, shapes)), rank


@dataclass(frozen=True, kw_only=True)
class SpendingMethod(AdapterMethod):
    """Settings of a method that hands ranks out: all together may cost `spend` parameters; None: no matter what."""

    spend: int | None = setting(None, least=1)

    def within(self: S, params: int, shapes: Shapes, rank: int, kinds: Sequence[str] = ()) -> tuple[S, int]:
        return replace(self, spend=params), rank_for_params(params, shapes)

    def grown(self, adapters: Sequence[Adapter], kept: Sequence[int], scores: Sequence[float]) -> GrowthPlan | None:
        """Ranks that spend the parameters on the adapters `kept`, one more where a score is largest; None: no limit."""
        order = ranked([scores[i] for i in kept])
        return None if self.spend is None else spread(self.spend, [(adapters[i],) for i in kept], order)


def ranked(scores: Sequence[float]) -> list[int]:
    """Indices by falling score; the earlier first where two are equal.

    >>> ranked([1.0, 3.0, 3.0])
    [1, 2, 0]
    """
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def spread(params: int, pairs: Sequence[Sequence[Adapter]], order: Sequence[int]) -> GrowthPlan:
    """Ranks that spend `params` on pairs of factors, each of one adapter or shared by several: one and the same, and
    one more along `order` while it fits. What grows is drawn anew by the restart that follows."""
    first = [pair[0] for pair in pairs]
    ranks = grown_ranks(params, [a.shape for a in first], [a.rank for a in first], order=order, remainder="top")
    named = {a.name: rank for pair, rank in zip(pairs, ranks, strict=True) for a in pair}
    return GrowthPlan(ranks=named, mode="gaussian", generator=torch.Generator().manual_seed(0), options={})
