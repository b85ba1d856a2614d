"""Pure functions that every run calls with the same few arguments: within tests, each is called once for each."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jinja2

ONCE: tuple[tuple[Any, str], ...] = (
    (jinja2.Environment, "compile"),  # the template of PEFT's model card, whenever an adapter is saved
    (importlib.import_module("weightlora.report.selection_map"), "_length"),  # how long a picture's labels are
)


def once(owner: Any, name: str) -> Callable[..., Any]:
    """That function, with a memory."""
    return functools.cache(getattr(owner, name))


def remember() -> None:
    """Give all of them a memory, in a process that ends with its tests."""
    for owner, name in ONCE:
        setattr(owner, name, once(owner, name))
