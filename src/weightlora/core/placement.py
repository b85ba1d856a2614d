"""Which adapters to keep when it is bytes (or operations) that are scarce: an exact budgeted selection."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from weightlora.errors import BudgetError, ConfigError

# Two totals of importance closer than this share count as equal: what float64 sums of thousands of terms cannot tell.
EQUAL = 1e-12
_Option = tuple[int, float, tuple[int, ...]]  # cost, importance, adapters


@dataclass(frozen=True, kw_only=True)
class PlacementCosts:
    r"""What a set of adapters costs, in whole units of anything: bytes of a run, operations of a step.

    The backward pass ends at the lowest block that holds an adapter, so a set S with lowest block d costs

    `total(S) = floor[d] + sum_{i in S} own[i] + sum_{g touched by S} group_bytes[g]`

    Args:
        depth: (n,) the block of each adapter, 0 the lowest.
        own: (n,) what an adapter adds once its input is kept.
        group: (n,) the index of the input that it reads; q, k and v of a layer share one.
        group_bytes: (groups,) what keeping that input costs; 0 if the base keeps it anyway.
        floor: (depths,) the cost without any adapter when backward ends at that block. Never rises with the block.

    >>> costs = PlacementCosts(depth=(0, 1, 1), own=(1, 1, 1), group=(0, 1, 1), group_bytes=(4, 4), floor=(20, 10))
    >>> costs.total([1, 2]), costs.total([0, 2])
    (16, 30)
    """

    depth: tuple[int, ...]
    own: tuple[int, ...]
    group: tuple[int, ...]
    group_bytes: tuple[int, ...]
    floor: tuple[int, ...]

    def total(self, chosen: Iterable[int]) -> int:
        """The cost of a set (not empty), as the class says."""
        chosen = list(chosen)
        groups = {self.group[i] for i in chosen}
        lowest = min(self.depth[i] for i in chosen)
        return self.floor[lowest] + sum(self.own[i] for i in chosen) + sum(self.group_bytes[g] for g in groups)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What :func:`place` chose: sorted indices, the lowest block of them, their importance and cost, the budget."""

    chosen: tuple[int, ...]
    depth: int
    importance: float
    total: int
    budget: int


def place(importance: Sequence[float], costs: PlacementCosts, budget: int) -> Placement:
    r"""The set of adapters with the highest total importance whose cost stays within a budget.

    `max over S of sum_{i in S} importance[i]  subject to  costs.total(S) <= budget`

    For each depth d that is a multiple-choice knapsack (each input has a menu of subsets of its adapters) with budget
    `budget - floor[d]`. Its relaxation bounds every depth at once; depths are solved from the highest bound down, until
    no bound is above the best set found. An adapter of importance 0 or less is never taken.

    The result is exact up to float64 (totals closer than 1e-12, relatively, count as equal). Real costs take little
    time, because adapters of one model have few distinct costs. The worst case is that of the knapsack problem: the
    number of partial sums worth keeping is bounded only by the budget in units of the costs' greatest common divisor
    (and by 2^n), and a menu only by 2^(adapters that read one input) if all of them cost something else.

    Args:
        importance: (n,) finite; in WeightLoRA the credits or omegas.
        costs: of the same n adapters.
        budget: in the costs' unit.

    Returns:
        The best set. Of equally important ones it is not always the cheapest.

    Raises:
        BudgetError: nothing fits; `smallest` is the least that any adapter of positive importance takes.
        ConfigError: an importance is not finite, or none is positive.

    Source: ours, a departure from the paper, which keeps a given number K. Branching from the relaxation's solution:
    Dyer, Riha and Walker 1995, Pisinger 1995.

    >>> costs = PlacementCosts(depth=(0, 1, 1), own=(1, 1, 1), group=(0, 1, 1), group_bytes=(4, 4), floor=(20, 10))
    >>> place([9.0, 2.0, 1.0], costs, 16)
    Placement(chosen=(1, 2), depth=1, importance=3.0, total=16, budget=16)
    >>> place([9.0, 2.0, 1.0], costs, 25).chosen
    (0,)
    >>> place([9.0, 2.0, 1.0], costs, 12)
    Traceback (most recent call last):
    ...
    weightlora.errors.BudgetError: no adapter fits into a budget of 12; the smallest placement takes 15
    """
    bad = [i for i, value in enumerate(importance) if not math.isfinite(value)]
    if bad:
        raise ConfigError(f"importances at {bad} are not finite; training diverged before the choice")
    worth = [i for i, value in enumerate(importance) if value > 0]
    if not worth:
        raise ConfigError(
            "no importance is positive, so no adapter is worth its cost; train longer before the choice, or give k"
        )
    alone = {i: costs.total([i]) for i in worth}
    fitting = [i for i in worth if alone[i] <= budget]
    if not fitting:
        smallest = min(alone.values())
        raise BudgetError(
            f"no adapter fits into a budget of {budget}; the smallest placement takes {smallest}", smallest=smallest
        )
    menus = _Menus(importance, costs, fitting)
    # To begin with, the best single one: no bound is above n times that, so the rounding of bounds is small beside it.
    best: tuple[int, ...] = (max(fitting, key=lambda i: importance[i]),)
    value = importance[best[0]]
    for bound, depth in sorted(_bounds(menus, costs, budget), reverse=True):
        if bound <= value * (1 + EQUAL):
            break
        found = _solve(menus.above(depth), budget - costs.floor[depth], value)
        if found is not None:
            best, value = found, math.fsum(importance[i] for i in found)
    chosen = tuple(sorted(best))
    return Placement(
        chosen=chosen,
        depth=min(costs.depth[i] for i in chosen),
        importance=value,
        total=costs.total(chosen),
        budget=budget,
    )


@dataclass(frozen=True, kw_only=True)
class _Menu:
    """The subsets of one input's adapters worth a thought, from the cheapest up: each dearer one is more important."""

    costs: list[int]
    values: list[float]
    sets: list[tuple[int, ...]]

    @cached_property
    def hull(self) -> list[int]:
        """Choices on the upper concave envelope of (cost, value)."""
        kept: list[int] = []
        for i in range(len(self.costs)):
            while len(kept) > 1 and self.slope(kept[-2], kept[-1]) <= self.slope(kept[-1], i):
                kept.pop()
            kept.append(i)
        return kept

    def slope(self, low: int, high: int) -> float:
        return (self.values[high] - self.values[low]) / (self.costs[high] - self.costs[low])


class _Menus:
    """The menu of every input, for the adapters at or above any block."""

    def __init__(self, importance: Sequence[float], costs: PlacementCosts, worth: Sequence[int]) -> None:
        self.importance, self.costs = importance, costs
        self.members: dict[int, list[int]] = {}
        for i in sorted(worth, key=lambda i: -costs.depth[i]):
            self.members.setdefault(costs.group[i], []).append(i)
        self.keys = {g: [-costs.depth[i] for i in members] for g, members in self.members.items()}
        self.made: dict[tuple[int, int], _Menu] = {}

    def above(self, depth: int) -> list[_Menu]:
        """Those of the inputs that an adapter in block `depth` or higher reads."""
        counts = ((group, bisect_right(keys, -depth)) for group, keys in self.keys.items())
        return [self.menu(group, count) for group, count in counts if count]

    def menu(self, group: int, count: int) -> _Menu:
        """Of the `count` highest adapters of one input."""
        if (group, count) not in self.made:
            self.made[group, count] = self._make(group, self.members[group][:count])
        return self.made[group, count]

    def _make(self, group: int, members: Sequence[int]) -> _Menu:
        first = self.costs.group_bytes[group]
        by_cost: dict[int, list[int]] = {}
        for i in sorted(members, key=lambda i: -self.importance[i]):
            by_cost.setdefault(self.costs.own[i], []).append(i)
        # Of adapters that cost the same, the most important ones. The input's cost is left out while subsets grow: it
        # is the same for all but the empty one.
        options: list[_Option] = [(0, 0.0, ())]
        for own, alike in by_cost.items():
            values = list(accumulate((self.importance[i] for i in alike), initial=0.0))
            options = _undominated(
                [(c + j * own, v + values[j], chosen + tuple(alike[:j]))
                 for c, v, chosen in options for j in range(len(alike) + 1)]
            )  # fmt: skip
        full = [(c + first, v, chosen) for c, v, chosen in options if chosen]
        options = _undominated([(0, 0.0, ()), *full])
        return _Menu(costs=[o[0] for o in options], values=[o[1] for o in options], sets=[o[2] for o in options])


def _undominated(options: list[_Option]) -> list[_Option]:
    """Options by rising cost, without those that cost no less than a better or equal one."""
    kept: list[_Option] = []
    for option in sorted(options, key=lambda o: (o[0], -o[1])):
        if not kept or option[1] > kept[-1][1]:
            kept.append(option)
    return kept


def _bounds(menus: _Menus, costs: PlacementCosts, budget: int) -> list[tuple[float, int]]:
    """(upper bound of the importance, depth) of every depth at which anything can fit."""
    depths = sorted({costs.depth[i] for members in menus.members.values() for i in members})
    depths = [d for d in depths if costs.floor[d] <= budget]
    # Menus of all members: where an input is read by several blocks, the bound is a little too high, never too low.
    every = [(menus.menu(g, len(m)), costs.depth[m[0]]) for g, m in menus.members.items()]
    edges = sorted(
        ((m.slope(a, b), m.costs[b] - m.costs[a], m.values[b] - m.values[a], top)
         for m, top in every for a, b in zip(m.hull, m.hull[1:], strict=False)), reverse=True,
    )  # fmt: skip
    lowest = torch.tensor(depths)[:, None]
    free = torch.tensor([m.values[0] for m, _ in every], dtype=torch.float64)
    base = (free * (torch.tensor([top for _, top in every]) >= lowest)).sum(1)
    if not edges:
        return list(zip(base.tolist(), depths, strict=True))
    slope, gain = (torch.tensor([e[i] for e in edges], dtype=torch.float64) for i in (0, 2))
    there = torch.tensor([e[3] for e in edges]) >= lowest
    cost = torch.tensor([e[1] for e in edges]) * there
    room = torch.tensor([budget - costs.floor[d] for d in depths])[:, None]
    # Along falling slopes: each step whole while it fits, the first that does not in part.
    part = (room - (cost.cumsum(1) - cost)).clamp(min=0).minimum(cost)
    whole = part == cost
    bound = base + torch.where(whole, gain * there, part * slope).sum(1)
    return list(zip(bound.tolist(), depths, strict=True))


def _solve(menus: list[_Menu], room: int, value: float) -> tuple[int, ...] | None:
    """The best set of one choice per menu that costs at most `room`, or None if it is not above `value`."""
    at, price = _relax(menus, room)
    cost = sum(m.costs[b] for m, b in zip(menus, at, strict=True))
    start = math.fsum(m.values[b] for m, b in zip(menus, at, strict=True))
    top = start + price * (room - cost)  # no set is above this
    slack = EQUAL * max(top, 1e-300)
    best, where = (start, (-1, 0)) if start > value else (value, None)
    core = _core(menus, at, price, top - best - slack)
    weights, values = torch.tensor([cost]), torch.tensor([start], dtype=torch.float64)
    trail: list[tuple[Tensor, int, Tensor]] = []
    for loss, group, moves in core:
        if top - loss <= best + slack:
            break  # from here on no other choice than the relaxation's can pay
        menu, now = menus[group], at[group]
        choices = [now, *moves]
        more = torch.tensor([menu.costs[j] - menu.costs[now] for j in choices])
        gain = torch.tensor([menu.values[j] - menu.values[now] for j in choices], dtype=torch.float64)
        weights, values = (weights[:, None] + more).flatten(), (values[:, None] + gain).flatten()
        kept = _front(weights, values, room, price, best + slack)
        if not len(kept):
            break
        weights, values = weights[kept], values[kept]
        trail.append((kept // len(choices), group, torch.tensor(choices)[kept % len(choices)]))
        fits = int(torch.searchsorted(weights, room, right=True)) - 1  # values rise with weights
        if fits >= 0 and float(values[fits]) > best + slack:
            best, where = float(values[fits]), (len(trail) - 1, fits)
    if where is None:
        return None
    return _walk_back(menus, at, trail, *where)


def _relax(menus: list[_Menu], room: int) -> tuple[list[int], float]:
    """The relaxation's choices, rounded down, and the importance that one more unit of cost would buy."""
    at = [m.hull[0] for m in menus]
    left = room - sum(m.costs[b] for m, b in zip(menus, at, strict=True))
    steps = sorted(
        (-m.slope(a, b), g, b, m.costs[b] - m.costs[a])
        for g, m in enumerate(menus)
        for a, b in zip(m.hull, m.hull[1:], strict=False)
    )
    for falling, group, choice, cost in steps:
        if cost > left:
            return at, -falling
        at[group], left = choice, left - cost
    return at, 0.0


def _core(menus: list[_Menu], at: list[int], price: float, gap: float) -> list[tuple[float, int, list[int]]]:
    """(smallest loss, menu, other choices) of the menus in which another choice than the relaxation's may pay.

    At this price per unit the relaxation's choice is the best of its menu. What another one loses against it is lost
    for good: choices that lose the whole gap between bound and best set are out.
    """
    found = []
    for group, (menu, now) in enumerate(zip(menus, at, strict=True)):
        here = menu.values[now] - price * menu.costs[now]
        losses = [here - (v - price * c) for c, v in zip(menu.costs, menu.values, strict=True)]
        moves = [j for j, loss in enumerate(losses) if j != now and loss < gap]
        if moves:
            found.append((max(0.0, min(losses[j] for j in moves)), group, moves))
    return sorted(found)


def _front(weights: Tensor, values: Tensor, room: int, price: float, floor: float) -> Tensor:
    """Indices, by rising weight, of the partial sums that may still win and that no lighter one equals in value."""
    alive = torch.nonzero(values + price * (room - weights) > floor).flatten()
    alive = alive[values[alive].argsort(descending=True, stable=True)]
    alive = alive[weights[alive].argsort(stable=True)]
    sums = values[alive]
    highest = torch.cat((sums.new_full((1,), -math.inf), sums.cummax(0).values[:-1])) if len(sums) else sums
    return alive[sums > highest]


def _walk_back(
    menus: list[_Menu], at: list[int], trail: list[tuple[Tensor, int, Tensor]], stage: int, index: int
) -> tuple[int, ...]:
    choice = list(at)
    for parents, group, moves in reversed(trail[: stage + 1]):
        choice[group] = int(moves[index])
        index = int(parents[index])
    return tuple(i for menu, j in zip(menus, choice, strict=True) for i in menu.sets[j])
