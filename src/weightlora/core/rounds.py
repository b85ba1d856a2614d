"""Who loses ranks and who receives them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def hand_out(
    count: int,
    scores: Sequence[float],
    free: Sequence[int],
    costs: Sequence[int] | None = None,
    budget: int | None = None,
) -> list[int]:
    """Split `count` ranks over receivers as evenly as their room allows; what is left over goes to higher scores.

    Args:
        count: ranks to hand out, 0 or more.
        scores: of each receiver; of equal ones the lowest index comes first.
        free: how many ranks each has room for.
        costs, budget: of a rank of each, and what all may cost together; None: no matter what.

    Returns:
        Ranks for each receiver; fewer than `count` in all only where there is no more room, or none that is paid for.

    Source: ALoRA; the cap is ours.

    >>> hand_out(8, [0.1, 0.3, 0.2], [9, 9, 9]), hand_out(8, [0.1, 0.3, 0.2], [9, 1, 9])
    ([2, 3, 3], [3, 1, 4])
    """
    given = [0] * len(free)
    order = sorted(range(len(free)), key=lambda i: (-scores[i], i))
    price, left = ([0] * len(free), 0) if costs is None or budget is None else (list(costs), budget)
    for _ in range(count):
        open_to = [i for i in order if given[i] < free[i] and price[i] <= left]
        if not open_to:
            break
        chosen = min(open_to, key=lambda i: given[i])  # the first of the least served
        given[chosen] += 1
        left -= price[chosen]
    return given


def one_round(
    live: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]],
    moves: int,
    room: Sequence[int],
    costs: Sequence[int] | None = None,
    budget: int | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """Which ranks go and which come: the `moves` lowest of all go, and modules that lost none share as many new ones.

    Args:
        live: ranks of each module that are on, ascending; a module without any receives none.
        scores: of these ranks, in the same order; of equal ones the earlier module's goes first.
        moves: how many go.
        room: how many ranks each module can have; a new rank is the lowest that is off.
        costs, budget: of a rank of each module, and what all ranks may cost afterwards: then as many come as that pays
            for. None: as many as go.

    Returns:
        Ranks that go and ranks that come, by module.

    Source: ALoRA (Liu et al. 2024); the cap is ours.

    >>> one_round([[0, 1], [0, 1], [0]], [[0.1, 0.9], [0.5, 0.6], [0.8]], 1, [4, 4, 4])
    ([[0], [], []], [[], [], [1]])
    """
    flat = [(score, i, rank) for i, part in enumerate(scores) for rank, score in zip(live[i], part, strict=True)]
    lowest = sorted(flat)[:moves]
    gone = [sorted(rank for _, i, rank in lowest if i == module) for module in range(len(live))]
    takers = [i for i, ranks in enumerate(live) if ranks and not gone[i]]
    means = [math.fsum(scores[i]) / len(scores[i]) for i in takers]
    came: list[list[int]] = [[] for _ in live]
    prices, left = None, None
    if costs is not None and budget is not None:
        prices = [costs[i] for i in takers]
        left = budget - sum((len(live[i]) - len(gone[i])) * cost for i, cost in enumerate(costs))
    free = [room[i] - len(live[i]) for i in takers]
    most = moves if left is None else sum(free)  # as many as went, or as many as are paid for
    for i, count in zip(takers, hand_out(most, means, free, prices, left), strict=True):
        came[i] = [rank for rank in range(room[i]) if rank not in live[i]][:count]
    return gone, came
