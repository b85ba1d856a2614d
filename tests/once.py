"""Pure functions that every run calls with the same few arguments: within tests, each is called once for each."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jinja2

ONCE: tuple[tuple[Any, str], ...] = (
    (jinja2.Environment, "compile"),  # the template of PEFT's model card, whenever an adapter is saved
)


def collect_seldom() -> None:
    """Take what was imported and built so far out of the garbage collector's sight, and let it look seldom.

    A trainer collects garbage whenever it begins to train. Looking through all modules of torch and Transformers takes
    it half a second, thousands of times; nothing of them is garbage. And of what is new it looks at the youngest only.
    The rest is collected where a test asks for it, or in Python's own time, which comes less often here: a tenth of
    what the tests computed was the search for garbage.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    trainers = sys.modules.get("accelerate.utils.memory")
    if trainers is not None:
        vars(trainers)["gc"] = SimpleNamespace(collect=lambda: gc.collect(0))


def once(owner: Any, name: str) -> Callable[..., Any]:
    """That function, with a memory."""
    return functools.cache(getattr(owner, name))


def remember() -> None:
    """Give all of them a memory, in a process that ends with its tests."""
    for owner, name in ONCE:
        setattr(owner, name, once(owner, name))
