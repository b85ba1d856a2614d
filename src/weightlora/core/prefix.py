"""The smallest set that carries a given share of a total."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from weightlora.errors import ConfigError


def smallest_prefix(scores: Sequence[float], threshold: float) -> list[int]:
    r"""Indices of the largest scores that together reach a share of the sum.

    With scores sorted in descending order, the smallest k with `sum_{i <= k} I_i >= threshold`, where
    `I_i = g_i / sum_j g_j`. Sums are exact and the threshold is the decimal as written, so at threshold 1 every score
    above 0 is in. Of equal scores the lowest index comes first.

    Args:
        scores: g, finite and not negative.
        threshold: in (0, 1].

    Returns:
        Sorted indices; none where every score is 0.

    Raises:
        ConfigError: a score is negative or not finite.

    Source: LoRA-drop, stage 2.

    >>> smallest_prefix([1.0, 6.0, 0.0, 3.0], 0.9), smallest_prefix([1.0, 6.0, 0.0, 3.0], 1.0)
    ([1, 3], [0, 1, 3])
    """
    bad = [i for i, score in enumerate(scores) if not (math.isfinite(score) and score >= 0)]
    if bad:
        raise ConfigError(f"scores at {bad} are negative or not finite; training diverged before the choice")
    exact = [Fraction(score) for score in scores]
    wanted, reached = Fraction(repr(float(threshold))) * sum(exact), Fraction(0)
    chosen: list[int] = []
    for index in sorted(range(len(exact)), key=lambda i: (-exact[i], i)):
        if reached >= wanted:
            break
        reached += exact[index]
        chosen.append(index)
    return sorted(chosen)
