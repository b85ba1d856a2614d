"""The optimizer after surgery: order, settings and memory of the survivors, for the optimizers people use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.builders import batches, lora, warm
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer, RMSprop

from weightlora.graft.adapters import adapters, parameters
from weightlora.graft.optimizer import remap
from weightlora.graft.surgery import disconnect, fold, grow_adapters

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda groups: AdamW(groups, lr=1e-2),
    "foreach": lambda groups: AdamW(groups, lr=1e-2, foreach=True),
    "fused": lambda groups: AdamW(groups, lr=1e-2, fused=True),
    "amsgrad": lambda groups: AdamW(groups, lr=1e-2, amsgrad=True),
    "sgd": lambda groups: SGD(groups, lr=1e-2),
    "momentum": lambda groups: SGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda groups: RMSprop(groups, lr=1e-3),
    "adagrad": lambda groups: Adagrad(groups, lr=1e-3),
}
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """A factors, then B factors and the head: two groups with settings of their own."""
    own = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in own if "lora_A" in n], "lr": 2e-3, "weight_decay": 0.1},
        {"params": [p for n, p in own if "lora_A" not in n], "weight_decay": 0.0},
    ]


def run(model: nn.Module, optimizer: Optimizer, count: int = 3, seed: int = 0, accumulate: int = 1) -> None:
    stream = batches(seed=seed)
    for _ in range(count):
        optimizer.zero_grad()
        for _ in range(accumulate):
            model(**next(stream)).loss.backward()
        optimizer.step()


def state_of(optimizer: Optimizer, parameter: Any) -> dict[str, Any]:
    state = optimizer.state.get(parameter, {})
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


@every_optimizer
def test_dropping_keeps_order_settings_and_memory(kind: str) -> None:
    model = warm(lora())
    optimizer = OPTIMIZERS[kind](groups(model))
    run(model, optimizer)
    gone = [a.name for a in adapters(model)][::2]
    dropped = {id(f) for pair in parameters(model, "default", gone).values() for f in pair}
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    order = [[id(p) for p in g["params"] if id(p) not in dropped] for g in optimizer.param_groups]
    memory = {id(p): state_of(optimizer, p) for g in optimizer.param_groups for p in g["params"]}
    remap(optimizer, disconnect(model, gone))
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == order
    assert not dropped & {id(p) for p in optimizer.state}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            now = state_of(optimizer, parameter)
            assert now.keys() == memory[id(parameter)].keys()
            for key, value in now.items():
                assert value is None or torch.equal(torch.as_tensor(value), torch.as_tensor(memory[id(parameter)][key]))
    run(model, optimizer, seed=1)


@every_optimizer
@pytest.mark.parametrize("mode", ["gaussian", "qr"])
def test_training_goes_on_after_fold_and_growth(kind: str, mode: Any) -> None:
    model = warm(lora())
    optimizer = OPTIMIZERS[kind](groups(model))
    run(model, optimizer)
    sizes = [len(g["params"]) for g in optimizer.param_groups]
    remap(optimizer, fold(model, {a.name: 1.5 for a in adapters(model)}))
    remap(optimizer, grow_adapters(model, {a.name: 6 for a in adapters(model)}, mode=mode, generator=torch.Generator()))
    assert [len(g["params"]) for g in optimizer.param_groups] == sizes
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    run(model, optimizer, seed=1, accumulate=2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert bool(parameter.isfinite().all())
            assert not torch.equal(parameter, before[name]), name


def test_optimizer_state_survives_saving() -> None:
    model = warm(lora())
    optimizer = OPTIMIZERS["amsgrad"](groups(model))
    run(model, optimizer)
    remap(optimizer, disconnect(model, [adapters(model)[0].name]))
    remap(optimizer, grow_adapters(model, {adapters(model)[0].name: 9}, mode="qr", generator=torch.Generator()))
    again = OPTIMIZERS["amsgrad"](groups(model))
    again.load_state_dict(optimizer.state_dict())
    for one, two in zip(optimizer.param_groups, again.param_groups, strict=True):
        for p, q in zip(one["params"], two["params"], strict=True):
            assert p is q
            assert all(torch.equal(optimizer.state[p][k], again.state[q][k]) for k in optimizer.state[p])


def test_momentum_follows_a_fold() -> None:
    model = warm(lora())
    optimizer = OPTIMIZERS["momentum"](groups(model))
    run(model, optimizer)
    name = adapters(model)[1].name
    A, B = parameters(model, "default")[name]
    old_A, old_B = state_of(optimizer, A), state_of(optimizer, B)
    remap(optimizer, fold(model, {name: -2.0}))
    # B' = -2 B, so gradients with respect to B' are those of B divided by -2.
    assert torch.equal(optimizer.state[B]["momentum_buffer"], old_B["momentum_buffer"] / -2)
    assert torch.equal(optimizer.state[A]["momentum_buffer"], old_A["momentum_buffer"])


def test_second_moments_follow_a_fold_squared() -> None:
    model = warm(lora())
    optimizer = OPTIMIZERS["amsgrad"](groups(model))
    run(model, optimizer)
    name = adapters(model)[1].name
    B = parameters(model, "default")[name][1]
    old = state_of(optimizer, B)
    remap(optimizer, fold(model, {name: -2.0}))
    assert torch.equal(optimizer.state[B]["exp_avg"], old["exp_avg"] / -2)
    assert torch.equal(optimizer.state[B]["exp_avg_sq"], old["exp_avg_sq"] / 4)
    assert torch.equal(optimizer.state[B]["max_exp_avg_sq"], old["max_exp_avg_sq"] / 4)
    assert float(optimizer.state[B]["step"]) == 3


def test_an_optimizer_that_never_stepped() -> None:
    model = warm(lora())
    optimizer = OPTIMIZERS["adamw"](groups(model))
    remap(optimizer, disconnect(model, [adapters(model)[0].name]))
    remap(optimizer, grow_adapters(model, {a.name: 6 for a in adapters(model)}, generator=torch.Generator()))
    assert not optimizer.state
    run(model, optimizer)
    assert len(optimizer.state) == 2 * 5 + 2
