"""Running a trainer's code for a count alone: whatever it changes on the way is put back."""

from __future__ import annotations

import contextlib
import copy
import operator
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from weightlora.cost.measure import isolated_rng
from weightlora.training.inside import model_of

CONTAINERS = (dict, list, set, deque, defaultdict, OrderedDict, Counter)
MANY = 1000  # what longer containers hold is data: they are put back themselves, not looked into
DEPTH = 8  # a trainer's loader, its inner loader, batch sampler, shard, sampler, generator
CODES = 4096  # integers of a longer buffer are a quantised layer's, which no forward pass changes
_LEAVES = (nn.Module, Tensor, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)


@contextlib.contextmanager
def undisturbed(trainer: Trainer) -> Iterator[None]:
    """Put back what running the trainer's code may change: its attributes and those of its loaders, samplers and data
    sets, down to what their lists hold, the model's modules and buffers, and random states.

    State elsewhere (a global list, a file) is not seen: code that may have some is never run for a count alone, see
    :func:`weightlora.training.trainer.own_code`.
    """
    model = model_of(trainer)
    with isolated_rng(), given_back(trainer), _modules_given_back(model):
        yield


@contextlib.contextmanager
def given_back(*objects: object) -> Iterator[None]:
    """Put back attributes of some objects, of what they lead to, and what lists and dictionaries in them hold."""
    noted = _Noted()
    for each in objects:
        noted.look(each, DEPTH)
    try:
        yield
    finally:
        noted.put_back()


@contextlib.contextmanager
def _modules_given_back(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass may leave in modules: every attribute, under every name, and buffers' values."""
    noted = _Noted()
    for module in model.modules():
        noted.container(vars(module), 1)
    with torch.no_grad():
        before = [(b, b.clone()) for b in model.buffers() if b.is_floating_point() or b.numel() <= CODES]
    try:
        yield
    finally:
        noted.put_back()
        with torch.no_grad():
            for buffer, value in before:
                if buffer.device.type != "meta" and not torch.equal(buffer, value):
                    buffer.copy_(value)


class _Noted:
    """What containers held and how far generators had come."""

    def __init__(self) -> None:
        self.containers: dict[int, tuple[Any, Any]] = {}
        self.generators: dict[int, tuple[Any, Any]] = {}

    def look(self, value: object, depth: int) -> None:
        """At anything: containers, random generators, and objects with attributes."""
        if type(value) in CONTAINERS:
            self.container(value, depth)
        elif isinstance(value, torch.Generator):
            self.generators.setdefault(id(value), (value, value.get_state()))
        elif isinstance(value, random.Random):
            self.generators.setdefault(id(value), (value, value.getstate()))
        elif isinstance(value, np.random.Generator):
            self.generators.setdefault(id(value), (value, copy.deepcopy(value.bit_generator.state)))
        elif not isinstance(value, _LEAVES) and type(getattr(value, "__dict__", None)) is dict:
            self.container(vars(value), depth)

    def container(self, value: Any, depth: int) -> None:
        """A container, and down to `depth` levels what it holds."""
        if id(value) in self.containers:
            return
        if not value:  # most of a module's tables of hooks
            self.containers[id(value)] = value, ()
            return
        self.containers[id(value)] = value, value.copy()
        held = list(value.values()) if isinstance(value, dict) else list(value)
        for item in held if depth and len(held) <= MANY else ():
            if depth > 1 or type(item) in CONTAINERS:
                self.look(item, depth - 1)

    def put_back(self) -> None:
        """Only what is not as it was."""
        for value, before in self.containers.values():
            if _same(value, before):
                continue
            value.clear()
            value.extend(before) if isinstance(value, list | deque) else value.update(before)
        for generator, state in self.generators.values():
            if isinstance(generator, torch.Generator):
                generator.set_state(state)
            elif isinstance(generator, random.Random):
                generator.setstate(state)
            else:
                generator.bit_generator.state = state


def _same(value: Any, before: Any) -> bool:
    """Whether a container holds the very same things in the same order."""
    if len(value) != len(before) or not value:
        return len(value) == len(before)
    if isinstance(value, set):
        return bool(value == before)
    if isinstance(value, dict) and not all(map(operator.is_, value.values(), before.values())):
        return False
    return all(map(operator.is_, value, before))
