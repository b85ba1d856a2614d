"""What gates add to a step outside its forward and backward pass: nothing per adapter, and no wait for the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.builders import batches, lora
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from weightlora.methods import LoRA, Method, WeightLoRA
from weightlora.training import attach

# Calls by which Python reads a tensor's values; on an accelerator each waits for it.
READS = {
    "item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "__bool__", "__int__", "__float__", "__index__",
    "__array__", "__contains__", "equal", "allclose",
}  # fmt: skip


class Kernels(TorchDispatchMode):
    """Counts the operations that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Notes the calls in READS."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def outside(made: Method, layers: int, steps: int = 4) -> tuple[Counter[str], list[str]]:
    """Operations and reads of everything between the backward pass and the next forward, in the last of some steps."""
    model = lora("bert", layers)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tuner = attach(model, made, optimizer, max_steps=100)
    for inputs, _ in zip(batches(), range(steps), strict=False):
        model(**inputs).loss.backward()
        with Reads() as reads, Kernels() as kernels:
            optimizer.step()
            tuner.step()
            optimizer.zero_grad()
    return kernels.seen, reads.seen


def gated(**settings: Any) -> WeightLoRA:
    return WeightLoRA(k=2, select_after=50, score="omega", gate_lr=0.1, **settings)


@pytest.mark.parametrize("engine", ["learning", "projecting"])
def test_gates_add_the_same_few_operations_for_any_number_of_adapters(engine: str) -> None:
    made = gated() if engine == "learning" else gated(project_every=1, drift=True)
    extra = []
    for layers in (1, 4):
        with_gates, reads = outside(made, layers)
        without, _ = outside(LoRA(), layers)
        assert reads == []
        assert not without - with_gates
        extra.append(with_gates - without)
    assert extra[0] == extra[1]  # 3 adapters, and 12
    assert 0 < sum(extra[0].values()) <= 20


def test_holding_closed_adapters_still_costs_one_read_of_the_whole_vector() -> None:
    """Which gradients to withhold is a decision of the host: one read of n numbers a projection, whatever n is."""
    for layers in (1, 4):
        assert outside(gated(project_every=1), layers)[1] == ["nonzero", "tolist"]
        assert outside(gated(project_every=3), layers)[1] == []  # the fourth step projects nothing


def test_reads_are_noticed() -> None:
    with Reads() as reads:
        t = torch.ones(2)
        bool(t.sum() > 0), t.tolist(), float(t[0]), t[0].item()
    assert reads.seen == ["__bool__", "tolist", "__float__", "item"]
