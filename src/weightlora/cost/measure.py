"""What one training step costs: counted bytes and operations, exact on any machine."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from weightlora.cost.saved import Held, Saved
from weightlora.errors import AdapterError, WeightLoRAError
from weightlora.graft.quantised import stored


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


def step_peak(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Peak of CUDA's allocator over a whole step with AdamW: the second one, for its state exists only after the first.

    Args:
        model: that is trained, two steps.
        loss: runs the forward pass of a batch.
    """
    gc.collect()
    torch.cuda.empty_cache()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.backward(loss())
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """Turn whatever goes wrong inside into an AdapterError of one line: what is only counted never ends a run.

    Raises:
        AdapterError: the caller goes on without the count, or refuses what cannot be had without it.
    """
    try:
        yield
    except WeightLoRAError:
        raise
    except Exception as error:  # models, losses and data sets are the user's, and may raise anything
        line = (str(error).strip() or "no message").splitlines()[0]
        raise AdapterError(f"{type(error).__name__}: {line}") from error


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


class KeptTensors:
    """Counts what autograd holds, each storage once, the model's parameters and buffers excluded.

    Args:
        model: whose own tensors do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        own = [part for t in (*model.parameters(), *model.buffers()) for part in stored(t)]
        self._excluded = {t.untyped_storage().data_ptr() for t in own}
        self._held: Held[Saved] = Held()

    def hooks(self) -> contextlib.AbstractContextManager[object]:
        """A context in which what is saved is noted; :meth:`let_go` once nobody goes back through it."""
        return torch.autograd.graph.saved_tensors_hooks(lambda t: self._held.add(Saved(t)), lambda saved: saved.tensor)

    def bytes(self) -> int:
        """What is held now."""
        storages = [part.untyped_storage() for saved in self._held for part in stored(saved.tensor)]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for pointer, size in sizes.items() if pointer not in self._excluded)

    def let_go(self) -> None:
        """Let a graph that nobody needs be freed."""
        self._held.let_go()


def kept_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Run a forward pass and let go of it; bytes that autograd held at its end, each storage once, parameters excluded.

    What was saved for a part of the graph that no gradient will reach is gone by then, and is not counted.
    """
    with _forward(model, loss) as (kept, _):
        return kept


@contextlib.contextmanager
def _forward(model: nn.Module, loss: Callable[[], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Bytes that autograd holds at the end of a forward pass, and the loss; its graph lives as long as the context."""
    kept = KeptTensors(model)
    try:
        with kept.hooks():
            value = loss()
        yield kept.bytes(), value
    finally:
        kept.let_go()


def step_cost(model: nn.Module, loss: Callable[[], Tensor]) -> StepCost:
    """Count one forward and backward pass.

    Args:
        model: whose parameters and buffers are not counted as activations. Its gradients are restored afterwards.
        loss: runs the forward pass and returns the loss.

    Returns:
        The cost. Under gradient checkpointing a block counts with the inputs that it holds on to; what it computes anew
        in backward comes on top while backward goes through it, and is not counted.

    >>> net = torch.nn.Linear(4, 2, bias=False)
    >>> x = torch.ones(3, 4)
    >>> step_cost(net, lambda: net(x).sum())
    StepCost(kept_activation_bytes=48, flops=96)
    """
    grads = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in grads:
        parameter.grad = None
    counter = FlopCounterMode(display=False)
    try:
        with isolated_rng(), counter, _forward(model, loss) as (kept, value):
            torch.autograd.backward(value)
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
    return StepCost(kept_activation_bytes=kept, flops=int(counter.get_total_flops()))
