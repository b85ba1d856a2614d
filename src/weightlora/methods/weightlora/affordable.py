"""Which adapters a budget of memory or step time can pay for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weightlora.core import format_bytes, place
from weightlora.errors import BudgetError
from weightlora.graft import Adapter
from weightlora.methods.policy import Budget, Room


@dataclass(frozen=True, kw_only=True)
class Affordable:
    """Indices to keep, the budget in words, and the facts that belong into the selection's record."""

    chosen: Sequence[int]
    words: str
    facts: dict[str, Any]


def most_important(worth: Sequence[float], budget: Budget, adapters: Sequence[Adapter]) -> Affordable:
    """The set with the highest total worth among all that fit, at the largest micro-batch at which any does.

    Args:
        worth: of every adapter, in the order of `adapters`; those at or below zero are not chosen.
        budget: what survivors may cost.
        adapters: all n.

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
    return Affordable(chosen=found.chosen, words=words, facts=facts | dict(budget.facts))


def _limit(budget: Budget, room: Room) -> str:
    if budget.kind == "memory":
        return f"{format_bytes(room.budget)} of memory at a micro-batch of {room.micro_batch}"
    return f"{room.budget:.4g} operations a step"
