"""Flexora against finite differences, stock Adam's rule, and plain LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.builders import QKV, adapter_state, lora, max_difference, trainer, warm
from tests.methods.test_lora_drop import everything, rough
from tests.methods.test_methods_battery import HELD_OUT, Loop
from torch import nn

import weightlora as wl
from weightlora.core.gates import block_gates
from weightlora.errors import ConfigError, ScheduleError
from weightlora.graft.adapters import adapters, block_numbers
from weightlora.graft.forms import Gates
from weightlora.methods import Flexora, StepView
from weightlora.methods.flexora import FlexoraPolicy
from weightlora.training.held_out import HeldOutBatches


def still(model: nn.Module, alpha: list[float]) -> tuple[FlexoraPolicy, StepView]:
    """A policy and a view on a float64 model that does not train."""
    gates = Gates(model, trainable=False, dtype=torch.float64)
    policy = FlexoraPolicy(Flexora(select_after=2), adapters(model), 9)
    with torch.no_grad():
        policy.alpha.copy_(torch.tensor(alpha))
    gates.set(policy.gate_values().detach())
    return policy, StepView(step=1, lr_factor=1.0, factors=(), gates=gates, held_out=HeldOutBatches(model, HELD_OUT))


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=9))
def test_gates_are_the_scaled_softmax(alpha: list[float]) -> None:
    values = torch.tensor(alpha, dtype=torch.float64)
    gates = block_gates(values)
    torch.testing.assert_close(gates, len(alpha) * torch.softmax(values, 0))
    assert float(gates.sum()) == pytest.approx(len(alpha))
    assert torch.equal(block_gates(torch.full_like(values, 0.7)), torch.ones_like(values))


def test_outer_gradient_against_finite_differences() -> None:
    model = warm(lora(layers=3)).double()
    policy, view = still(model, [0.3, -0.2, 0.1])
    state = torch.get_rng_state()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    got = policy.outer_gradient(view, 1)
    assert float(got.abs().min()) > 1e-6
    assert abs(float(got.sum())) < 1e-12  # softmax
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert view.gates is not None
    assert not view.gates.omega.requires_grad
    start, eps = policy.alpha.detach().clone(), 1e-5
    for block in range(3):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                policy.alpha.copy_(start)
                policy.alpha[block] += sign * eps
                view.gates.set(policy.gate_values())
                losses.append(float(HeldOutBatches(model, HELD_OUT).loss(1)))
        assert float(got[block]) == pytest.approx((losses[0] - losses[1]) / (2 * eps), rel=1e-6, abs=1e-9)


def test_a_block_without_effect_feels_only_the_softmax() -> None:
    model = warm(lora(layers=3)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "layer.1." in name:
                parameter.zero_()
    policy, view = still(model, [0.0, 0.5, 0.0])
    got = policy.outer_gradient(view, 0)
    # dL/dalpha_1 = g_1 (h_1 - mean) with h_1 = dL/dg_1 = 0, mean = sum_l g_l h_l / L; so dL/dalpha_1 = -g_1 mean.
    gates = block_gates(policy.alpha.detach())
    h = torch.zeros(3, dtype=torch.float64)
    h[0], h[2] = ((got[b] - gates[b] * got[1] / gates[1]) / gates[b] for b in (0, 2))
    assert float(got[1]) == pytest.approx(float(-gates[1] * (gates * h).sum() / 3), rel=1e-9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert float(policy.outer_gradient(view, 0).abs().max()) == 0.0


def test_alpha_moves_by_adam_on_batches_that_take_turns() -> None:
    loop = Loop.start(Flexora(select_after=4, outer_batches=3, alpha_lr=0.05))
    policy, seen = loop.tuner._driver.policy, []
    assert isinstance(policy, FlexoraPolicy)
    inner = policy.outer_gradient

    def noted(view: StepView, index: int) -> torch.Tensor:
        gradient = inner(view, index)
        seen.append((index, gradient.clone()))
        return gradient

    policy.outer_gradient = noted  # type: ignore[method-assign]  # looks, and goes on
    loop.run(3)
    assert [index for index, _ in seen] == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    m = v = alpha = torch.zeros(2, dtype=torch.float64)
    for t, (_, g) in enumerate(seen, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        alpha = alpha - 0.05 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(policy.alpha.detach(), alpha)
    assert max(loop.tuner.omegas.values()) > 1.0


def test_gates_of_one_are_plain_lora() -> None:
    """alpha moves by at most 1e-12, so every gate rounds to 1 in float32 and only the outer loop is left."""
    one = Loop.start(Flexora(select_after=5, alpha_lr=1e-12)).run(4)
    other = Loop.start(wl.LoRA()).run(4)
    assert set(one.tuner.omegas.values()) == {1.0}
    assert max_difference(adapter_state(one.model), adapter_state(other.model)) == 0.0


def test_keeps_blocks_strictly_above_zero_and_starts_again() -> None:
    model = lora(layers=3)
    loop = Loop.start(Flexora(select_after=4), model).run(3)
    policy = loop.tuner._driver.policy
    assert isinstance(policy, FlexoraPolicy)
    policy.alpha.data = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ScheduleError, match="no block's alpha is above 0"):
        policy.decide([1.0] * 9)
    policy.alpha.data = torch.tensor([0.5, 0.0, 1e-9], dtype=torch.float64)
    assert [c.kept for c in policy.decide([1.0] * 9).selection.choices] == [True] * 3 + [False] * 3 + [True] * 3
    policy.alpha.data = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)
    loop.run(4)
    live = adapters(model)
    assert [a.block for a in live] == [2, 2, 2]
    assert policy.setup.count(live) == 3 * 4 * (16 + 16)
    factors = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert sum(p.numel() for p in factors.values()) == policy.setup.count(live)
    assert all("layer.2." in n for n in factors)
    assert all(bool((p == 0).all()) for n, p in factors.items() if "lora_B" in n)
    assert not any(p in loop.optimizer.state for p in factors.values())
    heads = {id(p) for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert set(everything(loop.optimizer)) == {id(p) for p in factors.values()} | heads
    loop.run(6)
    assert all(p.grad is None for n, p in model.named_parameters() if not p.requires_grad)


def test_blocks_are_counted_over_the_model_and_outsiders_stay() -> None:
    bart = lora("bart")
    assert len(set(block_numbers(adapters(bart)))) == 4  # two of the encoder, two of the decoder
    model = lora(targets=[*QKV["bert"], "pooler.dense"])
    loop = Loop.start(Flexora(select_after=4), model).run(4)
    assert any("pooler" in a.name for a in adapters(model))
    loop.run(6)
    with pytest.raises(ScheduleError, match="the adapters are in 1; put them into 2 or more"):
        Loop.start(Flexora(select_after=4), lora(layers=1))


def test_bf16_and_accumulation_through_the_seam() -> None:
    model, optimizer, tuner = rough(Flexora(select_after=4))
    assert tuner.finish().k == 3
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert len(everything(optimizer)) == len(set(everything(optimizer)))


def test_fit_and_export(tmp_path: Path) -> None:
    each = trainer(tmp_path / "run", lora(layers=3), steps=8, count=40)
    result = wl.fit(each, Flexora(select_after=3, batches=2))
    assert result.selection is not None
    assert 0 < result.selection.k < 9
    assert wl.export(result, tmp_path / "out").max_difference <= 1e-5


@pytest.mark.parametrize(
    "settings", [{"alpha_lr": 0.0}, {"alpha_lr": float("nan")}, {"outer_batches": 0}, {"batches": 0}]
)
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Flexora(**settings)  # type: ignore[arg-type]
