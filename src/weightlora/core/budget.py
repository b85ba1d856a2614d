"""Arithmetic between adapters, ranks and parameters. A shape is always (d_in, d_out)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal

from weightlora.errors import AdapterError, ConfigError

Remainder = Literal["drop", "top"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_PARAMS = re.compile(r"(\d[\d_]*(?:\.\d+)?)\s*([kmb]?)", re.IGNORECASE | re.ASCII)


def resolve_k(k: int | float, n: int) -> int:
    """The number of adapters that `k` asks for, as a count or as a fraction of n.

    An int is a count in 1..n. A float in (0, 1) is a fraction: `max(1, k * n)` rounded half up, in decimal as
    written (0.29 of 50 is 14.5, so 15). 1.0 is all n.

    Args:
        k: count or fraction.
        n: adapters of the model.

    Raises:
        ConfigError: anything else; the line gives the allowed range.
        AdapterError: n is below 1.

    >>> resolve_k(10, 36), resolve_k(0.25, 36), resolve_k(0.001, 36), resolve_k(1.0, 36)
    (10, 9, 1, 36)
    >>> resolve_k(37, 36)
    Traceback (most recent call last):
    ...
    weightlora.errors.ConfigError: k=37 asks for more adapters than the 36 the model has; use 1..36 or a fraction \
such as 0.25
    """
    if n < 1:
        raise AdapterError("the model has no adapters to choose from; check the target modules of its LoRA config")
    allowed = f"use 1..{n} or a fraction such as 0.25"
    if isinstance(k, bool) or not isinstance(k, (int, float)):
        raise ConfigError(f"k={k!r} is neither a count nor a fraction; {allowed}")
    if isinstance(k, float):
        if not 0 < k <= 1:
            raise ConfigError(f"k={k} is not a fraction between 0 and 1; {allowed}")
        return max(1, int((Decimal(repr(float(k))) * n).to_integral_value(ROUND_HALF_UP)))
    if k < 1:
        raise ConfigError(f"k={k} keeps no adapter; {allowed}")
    if k > n:
        raise ConfigError(f"k={k} asks for more adapters than the {n} the model has; {allowed}")
    return int(k)


def adapter_params(r: int, d_in: int, d_out: int) -> int:
    """Parameters of one adapter, `r * (d_in + d_out)`.

    >>> adapter_params(8, 768, 768)
    12288
    """
    return r * (d_in + d_out)


def total_params(ranks: Sequence[int], shapes: Sequence[tuple[int, int]]) -> int:
    """Parameters of several adapters, `sum_i r_i * (d_in_i + d_out_i)`; gates not counted, as in the paper's tables.

    Args:
        ranks: rank of each adapter.
        shapes: (d_in, d_out) of each adapter.

    >>> total_params([8] * 36, [(768, 768)] * 36)
    442368
    """
    return sum(adapter_params(r, *shape) for r, shape in zip(ranks, shapes, strict=True))


def grown_ranks(
    budget: int,
    shapes: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    *,
    order: Sequence[int] | None = None,
    remainder: Remainder = "drop",
    max_rank: int | None = None,
) -> list[int]:
    r"""Ranks that spend a parameter budget on the kept adapters, uniformly.

    The largest single r' with `sum_i r'_i (d_in_i + d_out_i) <= budget`, where `r'_i` is r' held between the present
    rank and `min(d_in_i, d_out_i, max_rank)`: what a narrow adapter cannot use, the others get. Growth never shrinks:
    a rank above a cap stays, and if the present ranks already exceed the budget they come back unchanged.

    Args:
        budget: parameters to spend in total, for WeightLoRA+ those of all n adapters before selection.
        shapes: (d_in, d_out) of each kept adapter.
        ranks: present rank of each kept adapter.
        order: indices, most important first, for the remainder; the given order of adapters by default.
        remainder: "drop" leaves unspent what one more rank for all would exceed (one rank everywhere is what servers
            load); "top" hands out one rank at a time along `order`, round after round, while any fits.
        max_rank: no adapter grows past this.

    Returns:
        One rank for each adapter, none below its present one.

    Source: paper section 3.4, phase 2 ("in a way that the total memory consumption does not change"). Departure: the
    authors' code doubles ranks whatever the budget.

    >>> grown_ranks(442368, [(768, 768)] * 10, [8] * 10)
    [28, 28, 28, 28, 28, 28, 28, 28, 28, 28]
    >>> grown_ranks(442368, [(768, 768)] * 10, [8] * 10, order=range(9, -1, -1), remainder="top")
    [28, 28, 29, 29, 29, 29, 29, 29, 29, 29]
    """
    spent = total_params(ranks, shapes)
    order = range(len(ranks)) if order is None else order
    if spent >= budget:
        return list(ranks)
    caps = [max(r, min(*shape, max_rank or min(shape))) for r, shape in zip(ranks, shapes, strict=True)]

    def uniform(rank: int) -> list[int]:
        return [min(max(rank, low), high) for low, high in zip(ranks, caps, strict=True)]

    low, high = 1, max(caps, default=1)  # the cost of uniform(rank) never falls as rank rises
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if total_params(uniform(middle), shapes) <= budget else (low, middle - 1)
    grown = uniform(low)
    if remainder == "top":
        _spend(budget - total_params(grown, shapes), grown, shapes, caps, order)
    return grown


def rank_for_params(params: int, shapes: Sequence[tuple[int, int]]) -> int:
    """Largest rank r >= 1, the same for all adapters, with `r * sum_i (d_in_i + d_out_i) <= params`.

    Not capped by the shapes; :func:`grown_ranks` is.

    Raises:
        ConfigError: not even rank 1 fits; the line says what rank 1 takes.
        AdapterError: there are no shapes.

    >>> rank_for_params(442368, [(768, 768)] * 36)
    8
    """
    each = _per_rank(params, shapes)
    if params < sum(each):
        raise ConfigError(
            f"{params} parameters are too few for {len(shapes)} adapters of rank 1; "
            f"use at least {sum(each)} or fewer adapters"
        )
    return params // sum(each)


def k_for_params(params: int, r: int, shapes: Sequence[tuple[int, int]]) -> int:
    """Largest k such that any k adapters of rank r fit into `params`, so the k largest do.

    Raises:
        ConfigError: the largest adapter alone does not fit.
        AdapterError: there are no shapes.

    >>> k_for_params(123_000, 8, [(768, 768)] * 36)
    10
    """
    each = _per_rank(params, shapes)
    total, k = 0, 0
    for size in sorted(each, reverse=True):
        total += r * size
        if total > params:
            break
        k += 1
    if k == 0:
        raise ConfigError(
            f"{params} parameters are too few for the largest adapter at rank {r}; "
            f"use at least {r * max(each)} or a lower rank"
        )
    return k


def affordable(order: Sequence[int], costs: Sequence[int], budget: int) -> list[int]:
    """Which entries a budget pays for, taken along `order`; one that is too dear is passed over. Sorted.

    >>> affordable([2, 0, 1, 3], [5, 3, 4, 2], budget=11)
    [0, 2, 3]
    """
    taken, left = [], budget
    for index in order:
        if costs[index] <= left:
            taken.append(index)
            left -= costs[index]
    return sorted(taken)


def parse_params(text: str | int) -> int:
    """A number of parameters from "123k", "1.2M", "7B", "442_368" or an int; a fraction of one is dropped.

    Raises:
        ConfigError: not such a number, or below 1.

    >>> parse_params("123k"), parse_params("1.2M"), parse_params(442368)
    (123000, 1200000, 442368)
    """
    value = 0
    if isinstance(text, str):
        match = _PARAMS.fullmatch(text.strip())
        if match:
            value = int(Decimal(match[1].replace("_", "")) * _UNITS[match[2].lower()])
    elif isinstance(text, int) and not isinstance(text, bool):
        value = text
    if value < 1:
        raise ConfigError(f"{text!r} is not a number of parameters; write for example 442368, 123k or 1.2M")
    return value


def _spend(
    left: int, ranks: list[int], shapes: Sequence[tuple[int, int]], caps: list[int], order: Sequence[int]
) -> None:
    """Hand `left` parameters out along `order`, one rank at a time, changing `ranks` in place."""
    handed = True
    while handed:
        handed = False
        for i in order:
            if ranks[i] < caps[i] and sum(shapes[i]) <= left:
                ranks[i] += 1
                left -= sum(shapes[i])
                handed = True


def _per_rank(params: int, shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Parameters that one rank takes in each adapter."""
    if not shapes:
        raise AdapterError("there are no adapters to spend parameters on; check the target modules")
    return [adapter_params(1, *shape) for shape in shapes]
