"""From a budget of parameters to adapters and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from weightlora.core import grown_ranks, k_for_params
from weightlora.graft import Adapter
from weightlora.methods.base import GrowthPlan

ANY_K = "K is such that any K adapters fit, the largest too"  # of methods that choose K adapters of one rank


def with_k(method: Any, params: int, shapes: Sequence[tuple[int, int]], rank: int) -> tuple[Any, int]:
    """`method` with the largest K such that any K adapters of `rank` stay within `params`; the rank is kept."""
    return replace(method, k=k_for_params(params, rank, shapes)), rank


def spread(params: int, pairs: Sequence[Sequence[Adapter]], order: Sequence[int]) -> GrowthPlan:
    """Ranks that spend `params` on pairs of factors, each of one adapter or shared by several: one and the same, and
    one more along `order` while it fits. What grows is drawn anew by the restart that follows."""
    first = [pair[0] for pair in pairs]
    ranks = grown_ranks(params, [a.shape for a in first], [a.rank for a in first], order=order, remainder="top")
    named = {a.name: rank for pair, rank in zip(pairs, ranks, strict=True) for a in pair}
    return GrowthPlan(ranks=named, mode="gaussian", generator=torch.Generator().manual_seed(0), options={})
