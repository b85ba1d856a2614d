"""What one training step costs: counted bytes and operations, exact on any machine."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """``kept_activation_bytes``: what autograd keeps between forward and backward of one micro-batch, each storage
    once, parameters excluded. ``flops``: of its forward and backward."""

    kept_activation_bytes: int
    flops: int


class PeakMemory:
    """Peak bytes on the CUDA device since creation; None elsewhere, where no allocator keeps count."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> int | None:
        return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None


@contextlib.contextmanager
def isolated_rng() -> Iterator[None]:
    """Give back the state of Python's, NumPy's and torch's global generators on exit."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class _Kept:
    """Adds up the storages that autograd saves while `counting`."""

    def __init__(self, model: nn.Module) -> None:
        self.excluded = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.storages: dict[int, int] = {}
        self.counting = True
        self.alive: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        if self.counting:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.excluded:
                self.storages[storage.data_ptr()] = storage.nbytes()
                # Holding it keeps a freed address from being counted as the same storage again.
                self.alive.append(tensor.detach())
        return tensor


def step_cost(model: nn.Module, loss: Callable[[], Tensor]) -> StepCost:
    """Count one forward and backward pass.

    Args:
        model: whose parameters and buffers are not counted as activations. Its gradients are restored afterwards.
        loss: runs the forward pass and returns the loss.

    Returns:
        The cost. Under gradient checkpointing the inputs that checkpoints hold are outside what autograd reports, so
        the bytes are those of the parts that are not checkpointed.

    >>> net = torch.nn.Linear(4, 2, bias=False)
    >>> x = torch.ones(3, 4)
    >>> step_cost(net, lambda: net(x).sum())
    StepCost(kept_activation_bytes=48, flops=96)
    """
    grads = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in grads:
        parameter.grad = None
    kept, counter = _Kept(model), FlopCounterMode(display=False)
    try:
        with isolated_rng(), counter:
            with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
                value = loss()
                kept.counting = False
            value.backward()
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
    return StepCost(kept_activation_bytes=sum(kept.storages.values()), flops=int(counter.get_total_flops()))
