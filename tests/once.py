"""Pure functions that every run calls with the same few arguments: within tests, each is called once for each."""

from __future__ import annotations

import copy
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
import torch

Function = Callable[..., Any]
KEPT = 8  # small models, some tens of megabytes each


def _counted_once(count: Function) -> Function:
    """A trace, and the cost of a step, follow from the model's structure and the batch: those are looked at once."""
    known: dict[Any, Any] = {}

    @functools.wraps(count)
    def found(model: Any, loss: Callable[[], Any], **settings: Any) -> Any:
        held = inspect.getclosurevars(loss).nonlocals
        if held.keys() != {"trainer", "inputs"}:
            return count(model, loss, **settings)
        key = (*_structure(model), *_way_of_training(held["trainer"]), _numbers(held["inputs"]), *settings.items())
        if key not in known:
            known[key] = count(model, loss, **settings)
        return known[key]

    return found


def _structure(model: Any) -> tuple[Any, ...]:
    """Everything of a model but the values of its weights."""
    first: dict[int, str] = {}  # of tied parameters
    weights = tuple(
        (first.setdefault(id(p), name), p.shape, p.dtype, p.requires_grad, p.device)
        for name, p in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    )
    modules = tuple(
        (m.training, getattr(m, "gradient_checkpointing", None), len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in model.modules()
    )
    return repr(model), _paths(model), weights, modules, repr(getattr(model, "config", None))


def _paths(model: Any) -> tuple[Any, ...]:
    """By what adapters are computed."""
    return tuple(
        (name, type(variant), getattr(variant, "path", variant), type(getattr(variant, "form", None)))
        for m in model.modules()
        for name, variant in getattr(m, "lora_variant", {}).items()
    )


def _way_of_training(trainer: Any) -> tuple[Any, ...]:
    args = trainer.args
    return type(trainer), args.bf16, args.label_smoothing_factor, repr(args.neftune_noise_alpha)


def _numbers(inputs: Any) -> tuple[Any, ...]:
    return tuple(
        (key, t.dtype, t.shape, t.numpy().tobytes()) if isinstance(t, torch.Tensor) else (key, repr(t))
        for key, t in sorted(inputs.items())
    )


def _opened_once(opens: Function) -> Function:
    """A tokenizer for each caller, of which all share the part that is slow to read and does not change."""
    first = functools.cache(opens)

    @functools.wraps(opens)
    def another(*inputs: str) -> Any:
        return _another(first(*inputs))

    return another


def _another(tokenizer: Any) -> Any:
    shared = [tokenizer._tokenizer, *(v for v in vars(tokenizer).values() if isinstance(v, dict) and len(v) > 1000)]
    return copy.deepcopy(tokenizer, {id(each): each for each in shared})


def _built_once(build: Function) -> Function:
    """A small model of random weights follows from its name, its settings and the seed: each caller gets a copy."""
    known: dict[Any, Any] = {}

    @functools.wraps(build)
    def another(name: str, head: str, settings: dict[str, Any], dtype: Any) -> Any:
        key = (name, head, repr(settings), dtype, torch.initial_seed())
        if key not in known:
            if len(known) == KEPT:
                del known[next(iter(known))]
            known[key] = build(name, head, settings, dtype)
        model, tokenizer, missing = known[key]
        return copy.deepcopy(model), _another(tokenizer), set(missing)

    return another


# Where it is, its name, and how it gets a memory.
ONCE: tuple[tuple[Any, str, Callable[[Function], Function]], ...] = (
    (jinja2.Environment, "compile", functools.cache),  # the template of PEFT's model card, when an adapter is saved
    (importlib.import_module("weightlora.training.budget"), "trace", _counted_once),
    (importlib.import_module("weightlora.training.trainer"), "trace", _counted_once),
    (importlib.import_module("weightlora.training.trainer"), "step_cost", _counted_once),
    (importlib.import_module("weightlora.training.trainer"), "operations", _counted_once),
    (importlib.import_module("weightlora.tasks.models"), "_minilm_tokenizer", _opened_once),
    (importlib.import_module("weightlora.tasks.models"), "_build_shape", _built_once),
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
