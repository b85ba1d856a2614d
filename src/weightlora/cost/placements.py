"""The cost of a placement as a sum over levels, inputs and adapters: what an exact search can work with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from weightlora.core.placement import PlacementCosts
from weightlora.cost.activations import ActivationTrace
from weightlora.graft.adapters import Adapter


def placement_costs(
    trace: ActivationTrace, state: Sequence[int] | None = None, *, base: int = 0, checkpointing: bool = False
) -> PlacementCosts:
    """What placements cost, so that ``floor[lowest level] + sum of own + sum of group_bytes`` is never too little.

    Levels are in order of execution (an encoder lies below its decoder); adapters that read one input in one block
    share theirs. The sum is what is kept, but for what the lowest level itself decides: with only the value projection
    of a block alive, the base keeps less of that block than with its query.

    Args:
        trace: of the model with every adapter live.
        state: (n,) bytes of each adapter's parameters, gradients and optimizer state.
        base: bytes of everything that does not depend on the placement; they go into every floor.
        checkpointing: what blocks compute anew in backward is in the floor, with all that could live there.
    """
    n = len(trace.adapters)
    own = list(state or [0] * n)
    pieces = [trace.pieces(i) for i in trace.every]
    main = [max((s for s in mine if not trace.storages[s].ranked), key=mine.__getitem__, default=-1) for mine in pieces]
    depth = _levels(trace, pieces, main)
    levels = range(max(depth) + 1)
    above = [[i for i in trace.every if depth[i] >= level] for level in levels]
    inputs = sorted({m for m in main if m >= 0})
    # An adapter without an input of its own to keep is a group by itself, which costs nothing.
    group = tuple(inputs.index(m) if m >= 0 else len(inputs) for m in main)
    if checkpointing:
        floor = tuple(base + trace.kept(live, checkpointing=True) + trace.recomputed(live) for live in above)
        return _costs(depth, own, group, (0,) * (len(inputs) + 1), floor)

    users = Counter(storage for mine in pieces for storage in mine)
    for i, mine in enumerate(pieces):
        own[i] += sum(size for s, size in mine.items() if s != main[i] and users[s] == 1)
    shared = {s: size for i, mine in enumerate(pieces) for s, size in mine.items() if s != main[i] and users[s] > 1}
    # The base keeps an input anyway where it does so for whatever adapter lives below it; else it is paid for.
    lowest = {m: min(depth[i] for i in trace.every if main[i] == m) for m in inputs}
    free = {m for m in inputs if trace.base_keeps(m, [i for i in trace.every if depth[i] < lowest[m]])}
    floor = tuple(
        base
        + sum(
            {
                **trace.base_sizes(live),
                **shared,
                **{main[i]: trace.storages[main[i]].size for i in live if depth[i] == level and main[i] in free},
            }.values()
        )
        for level, live in zip(levels, above, strict=True)
    )
    sizes = (*(0 if m in free else trace.storages[m].size for m in inputs), 0)
    return _costs(depth, own, group, sizes, floor)


def operation_costs(adapters: Sequence[Adapter], arrivals: Sequence[int], tokens: Sequence[int]) -> PlacementCosts:
    """The same for operations of one forward and backward pass.

    An adapter takes ``6 tokens r (d_in + d_out)``: two products forward, four backward (the lowest needs one less).

    Args:
        adapters: in module order.
        arrivals: (n,) operations of the base, forward included, until gradients reach the output of each layer.
        tokens: (n,) that each layer sees.
    """
    order = sorted(set(arrivals), reverse=True)  # gradients arrive last at the lowest
    return PlacementCosts(
        depth=tuple(order.index(arrival) for arrival in arrivals),
        own=tuple(6 * t * a.rank * (a.d_in + a.d_out) for t, a in zip(tokens, adapters, strict=True)),
        group=(0,) * len(adapters),
        group_bytes=(0,),
        floor=tuple(order),
    )


def reserved(costs: PlacementCosts, params: Sequence[int]) -> PlacementCosts:
    """Costs for survivors that will grow into the parameters of all adapters: what adapters can cost then, whichever
    live, is in every floor.

    Args:
        costs: at the present ranks.
        params: (n,) of each adapter.
    """
    dearest = max(own / count for own, count in zip(costs.own, params, strict=True))
    most = int(dearest * sum(params)) + 1
    return replace(costs, own=(0,) * len(costs.own), floor=tuple(floor + most for floor in costs.floor))


def _costs(
    depth: tuple[int, ...], own: Sequence[int], group: tuple[int, ...], sizes: tuple[int, ...], floor: Sequence[int]
) -> PlacementCosts:
    # Where levels run side by side (an encoder's and a decoder's) a higher one may keep more: then each below it counts
    # as if it kept as much, which is never too little.
    falling = tuple(accumulate(reversed(floor), max))[::-1]
    return PlacementCosts(depth=depth, own=tuple(own), group=group, group_bytes=sizes, floor=falling)


def _levels(trace: ActivationTrace, pieces: Sequence[Mapping[int, int]], main: Sequence[int]) -> tuple[int, ...]:
    """The level of each adapter, in order of the first call of each level."""
    called = [min((s for s in mine if trace.storages[s].ranked), default=0) for mine in pieces]
    unit = [trace.storages[storage].uses[0][2] for storage in called]
    keys = [(main[i], unit[i]) for i in trace.every]
    first: dict[tuple[int, int], int] = {}
    for i in sorted(trace.every, key=called.__getitem__):
        first.setdefault(keys[i], len(first))
    return tuple(first[key] for key in keys)
