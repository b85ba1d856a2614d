"""Pure functions that every run calls with the same few arguments: within tests, each is called once for each."""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jinja2

Function = Callable[..., Any]


def _traced_once(trace: Function) -> Function:
    """A trace follows from the model's structure and the batch: the same of both need no second one."""
    known: dict[Any, Any] = {}

    @functools.wraps(trace)
    def found(model: Any, loss: Callable[[], Any], **settings: Any) -> Any:
        held = inspect.getclosurevars(loss).nonlocals
        if held.keys() != {"trainer", "inputs"}:
            return trace(model, loss, **settings)
        key = (*_structure(model), *_way_of_training(held["trainer"]), _numbers(held["inputs"]), *settings.items())
        if key not in known:
            known[key] = trace(model, loss, **settings)
        return known[key]

    return found


def _structure(model: Any) -> tuple[Any, ...]:
    """Everything of a model but the values of its weights."""
    first: dict[int, str] = {}  # of tied parameters
    weights = tuple(
        (first.setdefault(id(p), name), p.shape, p.dtype, p.requires_grad, p.device)
        for name, p in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    )
    modules = tuple((m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules())
    return repr(model), weights, modules, repr(getattr(model, "config", None))


def _way_of_training(trainer: Any) -> tuple[Any, ...]:
    args = trainer.args
    return type(trainer), args.bf16, args.label_smoothing_factor, repr(args.neftune_noise_alpha)


def _numbers(inputs: Any) -> tuple[Any, ...]:
    return tuple((key, t.dtype, t.shape, t.numpy().tobytes()) for key, t in sorted(inputs.items()))


# Where it is, its name, and how it gets a memory.
ONCE: tuple[tuple[Any, str, Callable[[Function], Function]], ...] = (
    (jinja2.Environment, "compile", functools.cache),  # the template of PEFT's model card, when an adapter is saved
    (importlib.import_module("weightlora.training.budget"), "trace", _traced_once),
    (importlib.import_module("weightlora.training.trainer"), "trace", _traced_once),
    # Accelerate asks at every step whether a package is installed.
    (importlib.import_module("accelerate.utils.imports"), "_is_package_available", functools.cache),
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
    gc.enable()
    trainers = sys.modules.get("accelerate.utils.memory")
    if trainers is not None:
        vars(trainers)["gc"] = SimpleNamespace(collect=lambda: gc.collect(0))


def remember(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Give all of them a memory; without a `patch` that takes it away again, until this process ends.

    And nothing waits for the disk: tests kill processes, but they cut no power. That a failing ``fsync`` is seen has a
    test of its own.
    """
    for owner, name, memory in ONCE:
        patch(owner, name, memory(getattr(owner, name)))
    patch(os, "fsync", lambda _: None)
