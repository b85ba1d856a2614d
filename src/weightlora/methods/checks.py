"""What a setting may be: words, counts, shares of the adapters and of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from weightlora.core.budget import resolve_k
from weightlora.errors import ConfigError, ScheduleError
from weightlora.graft.adapters import Adapter


def check_k_value(k: int | float | None, name: str = "k") -> None:
    """Refuse a ``k`` that no model could satisfy. A float is a share, so that 1.0 is all adapters and 1 is one.

    >>> check_k_value(0)
    Traceback (most recent call last):
    ...
    weightlora.errors.ConfigError: k=0 is not allowed; use a count of adapters (1 or more) or a share such as 0.25
    """
    if k is not None and not (0 < k <= 1 if isinstance(k, float) else k >= 1):
        raise ConfigError(f"{name}={k!r} is not allowed; use a count of adapters (1 or more) or a share such as 0.25")


def check_k(k: int | float, live: Sequence[Adapter]) -> int:
    """``k`` as a count, or a ScheduleError that says what the model allows."""
    try:
        return resolve_k(k, len(live))
    except ConfigError as error:
        raise ScheduleError(str(error)) from None


def check_steps(steps: int | float | None, name: str) -> None:
    """Refuse a length that no run could have: a number of optimizer steps, or a share of the run below 1. 1.0 is
    neither: one step to some, the whole run to others.

    >>> check_steps(0, "select_after")
    Traceback (most recent call last):
    ...
    weightlora.errors.ConfigError: select_after=0 is not allowed; use a number of steps (1 or more) or a share below 1
    """
    if isinstance(steps, float) and steps == 1:
        raise ConfigError(f"{name}=1.0 may mean one step or the whole run; use 1 for one, a share such as 0.15 else")
    if steps is not None and (not 0 < steps < math.inf or (steps > 1 and steps != int(steps))):
        raise ConfigError(f"{name}={steps!r} is not allowed; use a number of steps (1 or more) or a share below 1")


def check_warmup(steps: int | float, max_steps: int, name: str = "select_after") -> int:
    """A warm-up length in optimizer steps; a fraction means a share of the run. `name` is for messages.

    Raises:
        ScheduleError: it is not inside the run.

    >>> check_warmup(0.1, 300), check_warmup(50, 300)
    (30, 50)
    """
    count = max(1, round(steps * max_steps)) if isinstance(steps, float) and steps < 1 else int(steps)
    if count >= max_steps:
        raise ScheduleError(
            f"{name}={steps} needs more than the {max_steps} optimizer steps of this run;"
            + (f" use at most {max_steps - 1}, or train longer" if max_steps > 1 else " train longer")
        )
    return count


def check_select_after(steps: int | float, max_steps: int) -> int:
    """The step T after which adapters are chosen. A share of the run is two steps at least: in the first one the
    learning rate of a schedule is often still 0, and nothing has moved.

    Raises:
        ScheduleError: T is not inside the run.

    >>> check_select_after(0.15, 300), check_select_after(0.15, 8), check_select_after(1, 8)
    (45, 2, 1)
    """
    count = check_warmup(steps, max_steps)
    return max(2, count) if isinstance(steps, float) and max_steps > 2 else count


def check_interval(interval: int | float, max_steps: int, name: str = "deltaT") -> int:
    """Steps between events: a count, or a share of the run.

    >>> check_interval(100, 50), check_interval(0.1, 50)
    (100, 5)
    """
    if isinstance(interval, int) and interval >= max_steps:
        return interval  # legal: the last event comes whatever the interval
    return check_warmup(interval, max_steps, name)
