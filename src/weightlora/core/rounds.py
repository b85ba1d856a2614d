"""Who receives the ranks that others lost."""

from __future__ import annotations

from collections.abc import Sequence

from weightlora.core._check import check_count
from weightlora.errors import ConfigError


def hand_out(count: int, scores: Sequence[float], free: Sequence[int]) -> list[int]:
    """Split `count` ranks over receivers as evenly as their room allows; what is left over goes to higher scores.

    Args:
        count: ranks to hand out, 0 or more.
        scores: of each receiver; of equal ones the lowest index comes first.
        free: how many ranks each has room for.

    Returns:
        Ranks for each receiver; fewer than `count` in all only where there is no more room.

    Raises:
        ConfigError: lengths differ or a count is negative.

    Source: ALoRA; the cap is ours.

    >>> hand_out(8, [0.1, 0.3, 0.2], [9, 9, 9]), hand_out(8, [0.1, 0.3, 0.2], [9, 1, 9])
    ([2, 3, 3], [3, 1, 4])
    """
    if len(scores) != len(free):
        raise ConfigError(f"{len(scores)} scores for {len(free)} receivers; give one score for each")
    for name, value in (("count", count), *(("free", room) for room in free)):
        check_count(name, value, 0)
    given = [0] * len(free)
    order = sorted(range(len(free)), key=lambda i: (-scores[i], i))
    for _ in range(count):
        open_to = [i for i in order if given[i] < free[i]]
        if not open_to:
            break
        given[min(open_to, key=lambda i: given[i])] += 1  # the first of the least served
    return given
