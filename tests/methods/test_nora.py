"""NoRA: the frozen outer pair against a dense search, the inner pair against autograd on the dense update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import adapter_state, base, batch, logits, lora, max_difference, trainer
from tests.methods.test_methods_battery import STEPS, Loop
from torch import nn

import weightlora as wl
from weightlora.core.factorise import major_pair
from weightlora.errors import AdapterError, ConfigError, ScheduleError
from weightlora.graft.adapters import adapters, layer_weights, parameters
from weightlora.graft.watch import input_size
from weightlora.methods import Method, MiLoRA, NoRA
from weightlora.training import attach
from weightlora.training.held_out import HeldOutBatches


def inner(model: Any) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if name.startswith("form_")]


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_outer_pair_is_the_best_weighted_approximation(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(*shape, generator=generator, dtype=torch.float64)
    S = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.1
    A, B = major_pair(W, 3, S)
    reached = torch.linalg.norm((W - B @ A) * S)
    assert torch.allclose(reached, torch.linalg.svdvals(W * S)[3:].square().sum().sqrt())  # Eckart and Young's minimum
    plain_A, plain_B = major_pair(W, 3)
    assert float(torch.linalg.norm((W - plain_B @ plain_A) * S)) > float(reached)
    assert float(torch.linalg.norm(W - plain_B @ plain_A)) < float(torch.linalg.norm(W - B @ A))
    S[0] = 0.0
    assert all(bool(torch.isfinite(t).all()) for t in major_pair(W, 3, S))
    for wrong in (-S, 0 * S, S / 0):
        with pytest.raises(ConfigError, match=r"weights must be .* finite numbers"):
            major_pair(W, 3, wrong)


def test_only_the_inner_pair_trains_and_it_starts_at_zero(tmp_path: Path) -> None:
    loop = Loop.start(NoRA(calibration_batches=0))
    frozen = [(A, B) for A, B in parameters(loop.model, "default").values()]
    start = [t.detach().clone() for pair in frozen for t in pair]
    assert not any(t.requires_grad for pair in frozen for t in pair)
    for (A, B), W in zip(frozen, layer_weights(loop.model, "default"), strict=True):
        assert torch.allclose(B @ A, W, atol=1e-4)  # rank 4 * 4 = 16 is all of W here
    assert torch.equal(logits(loop.model, batch()), logits(base("bert"), batch()))
    loop.run(STEPS)
    assert all(torch.equal(a, b) for a, b in zip((t for pair in frozen for t in pair), start, strict=True))
    assert all(t.grad is None and t not in loop.optimizer.state for pair in frozen for t in pair)
    assert all(bool(p.any()) for p in inner(loop.model))
    policy, live = loop.tuner._driver.policy, logits(loop.model, batch())
    assert not torch.allclose(live, logits(base("bert"), batch()), atol=1e-2)
    count = sum(p.numel() for p in inner(loop.model))
    assert count == loop.tuner._driver.counts["trainable"] == 6 * 2 * 16 * 4
    loop.tuner.finish()
    assert torch.allclose(logits(loop.model, batch()), live, atol=1e-5)
    assert policy.setup.count(adapters(loop.model)) == count
    assert [(a.rank, a.scale) for a in adapters(loop.model)] == [(4, 2.0)] * 6
    assert all(t.requires_grad for pair in parameters(loop.model, "default").values() for t in pair)
    assert not inner(loop.model)
    assert wl.export(loop.model, tmp_path / "out", "portable").max_difference < 1e-5


def test_computes_the_nested_product_with_the_gradients_of_the_loss() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(8, 12)), LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    attach(model, NoRA(outer_rank=5, calibration_batches=0), torch.optim.SGD(model.parameters(), lr=0.1))
    small_A, small_B = (p for p in inner(model))
    with torch.no_grad():
        small_B.normal_()
    ((A, B),) = parameters(model, "default").values()
    assert (A.shape, B.shape, small_A.shape, small_B.shape) == ((5, 8), (12, 5), (2, 5), (5, 2))
    x = torch.randn(3, 4, 8)
    wide = [t.detach().double().requires_grad_() for t in (small_A, small_B)]
    dW = 1.5 * B.double() @ wide[1] @ wide[0] @ A.double()
    layer = model.base_model.model[0].base_layer
    expected = x.double() @ (layer.weight.double() + dW).T + layer.bias.double()
    out = model(x)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in zip((small_A, small_B), wide, strict=True):
        assert torch.allclose(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-3)


def test_activations_weigh_the_approximation() -> None:
    model, rows = lora(rank=2), [batch(seed=1), batch(seed=2)]
    seen: dict[str, list[torch.Tensor]] = {}
    plain = base("bert").eval()
    hooks = [
        module.register_forward_hook(lambda _m, args, _o, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for row in rows:
        plain(**row)
    for hook in hooks:
        hook.remove()
    before = torch.get_rng_state()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attach(model, NoRA(outer_rank=3, calibration_batches=2, exponent=0.5), optimizer, held_out=rows)
    assert torch.equal(torch.get_rng_state(), before)
    weights = layer_weights(model, "default")
    for a, (A, B), W in zip(adapters(model), parameters(model, "default").values(), weights, strict=True):
        S = torch.cat(seen[a.name]).abs().double().mean((0, 1)).sqrt()
        reached = torch.linalg.norm((W.double() - B.double() @ A.double()) * S)
        assert torch.allclose(reached, torch.linalg.svdvals(W.double() * S)[3:].square().sum().sqrt(), rtol=1e-5)
    fresh = lora()
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    with pytest.raises(ScheduleError, match="nora needs batches that the run does not train on"):
        attach(fresh, NoRA(calibration_batches=1), optimizer, max_steps=9)
    assert len(HeldOutBatches(model, rows).watch(0, input_size)) == 6


@pytest.mark.parametrize("made", [NoRA(calibration_batches=1), MiLoRA()], ids=lambda made: made.name)
def test_a_quantised_base_is_refused_before_anything_is_touched(made: Method, tmp_path: Path) -> None:
    """One layer, the last, is stored in another format; no rank, row or layer may have changed."""
    each = trainer(tmp_path, count=40)
    model, rows = each.model, each.train_dataset
    last = [m for name, m in model.named_modules() if name.endswith("value.base_layer")][-1]
    last.weight = nn.Parameter(last.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    before, live = adapter_state(model), adapters(model)
    modules = [type(module) for module in model.modules()]
    with pytest.raises(
        AdapterError, match=rf"value is quantised \(torch.float8_e4m3fn, .*; {made.name} needs its sing"
    ):
        wl.fit(each, made)
    assert max_difference(adapter_state(model), before) == 0.0
    assert adapters(model) == live
    assert [type(module) for module in model.modules()] == modules
    assert not any(getattr(module, "lora_variant", None) for module in model.modules())
    assert each.train_dataset is rows
    assert each.optimizer is None
    assert not list(tmp_path.iterdir())


def test_ranks_and_settings_that_cannot_be() -> None:
    with pytest.raises(
        AdapterError,
        match=r"rank 17 on .*query is more than the 16 singular values of its weight, from which nora starts",
    ):
        Loop.start(NoRA(outer_rank=17))
    with pytest.raises(AdapterError, match=r"outer_rank=3 is below the rank 4 of .*query; use 4 or more"):
        Loop.start(NoRA(outer_rank=3))
    for wrong in ({"outer_rank": 0}, {"calibration_batches": -1}, {"exponent": float("nan")}, {"exponent": -1.0}):
        with pytest.raises(ConfigError, match=r"is not (allowed|usable)"):
            NoRA(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("params", [12, 100, 768, 5000])
def test_a_budget_is_kept(params: int) -> None:
    made, rank = NoRA().within(params, [(16, 16)] * 6, 4)
    loop = Loop.start(made, lora(rank=rank))
    assert loop.tuner._driver.counts["trainable"] <= params
    with pytest.raises(ConfigError, match="11 parameters are too few for nora of rank 1 on 6 layers; use at least 12"):
        NoRA().within(11, [(16, 16)] * 6, 4)


def test_a_seed_decides() -> None:
    one, again, other = (Loop.start(NoRA(seed=seed)).run(2) for seed in (0, 0, 1))
    assert max_difference(adapter_state(one.model), adapter_state(again.model)) == 0.0
    assert max_difference(adapter_state(one.model), adapter_state(other.model)) > 0.0
