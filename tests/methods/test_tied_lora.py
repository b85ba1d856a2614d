"""Tied-LoRA: one pair of factors per module kind, two vectors per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.builders import ALL_LINEAR, adapter_state, batch, logits, lora, max_difference, warm
from tests.methods.test_methods_battery import STEPS, Loop

import weightlora as wl
from weightlora.errors import ConfigError
from weightlora.graft.adapters import adapters, parameters
from weightlora.methods import TiedLoRA

L, R, D = 2, 4, 16


def vectors(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model.form_u, model.form_v


@pytest.mark.parametrize("variant", ["tl6", "tl5"])
def test_layers_of_a_kind_share_one_storage_that_counts_once(variant: str) -> None:
    loop = Loop.start(TiedLoRA(variant=variant))
    live = adapters(loop.model)
    for a in live:
        owner = next(b for b in live if b.kind == a.kind)
        assert a.tied == (None if owner is a else owner.index)
    trained = {id(p): p.numel() for group in loop.optimizer.param_groups for p in group["params"]}
    head = sum(p.numel() for name, p in loop.model.named_parameters() if "modules_to_save" in name)
    formula = 3 * R * 2 * D + (3 * L * (R + D) if variant == "tl6" else 0)
    policy = loop.tuner._driver.policy
    assert sum(trained.values()) - head == loop.tuner._driver.counts["trainable"] == formula
    loop.run(2).tuner.finish()
    assert policy.setup.count(adapters(loop.model)) == formula


def test_layers_that_differ_in_shape_do_not_share() -> None:
    loop = Loop.start(TiedLoRA(), lora(targets=ALL_LINEAR["bert"]))
    found = {(a.kind, a.shape) for a in adapters(loop.model)}
    assert len({id(A) for A, _ in parameters(loop.model, "default").values()}) == len(found) == 5


def test_untied_copies_at_the_start_compute_the_same() -> None:
    tied = warm(Loop.start(TiedLoRA()).model)
    plain = lora()
    pairs = zip(parameters(plain, "default").values(), parameters(tied, "default").values(), strict=True)
    with torch.no_grad():
        for own, shared in pairs:
            for mine, theirs in zip(own, shared, strict=True):
                mine.copy_(theirs)
    assert torch.allclose(logits(tied, batch()), logits(plain, batch()), atol=1e-6)
    for model in (tied, plain):
        model.eval()
        model.zero_grad()
        model(**batch()).loss.backward()
    summed: dict[str, Any] = {}
    for a, (A, _) in zip(adapters(plain), parameters(plain, "default").values(), strict=True):
        assert A.grad is not None
        summed[a.kind] = summed.get(a.kind, 0) + A.grad
    for a, (A, _) in zip(adapters(tied), parameters(tied, "default").values(), strict=True):
        assert A.grad is not None
        assert torch.allclose(A.grad, summed[a.kind], atol=1e-6)


def test_computes_with_the_vectors_and_is_vera_where_the_factors_stand_still(tmp_path: Path) -> None:
    loop = Loop.start(TiedLoRA())
    warm(loop.model)
    u, v = vectors(loop.model)
    with torch.no_grad():
        u.copy_(torch.linspace(-1, 2, u.numel()))
        v.copy_(torch.linspace(2, -1, v.numel()))
    plain = lora()
    with torch.no_grad():
        pairs = zip(parameters(plain, "default").values(), parameters(loop.model, "default").values(), strict=True)
        for i, ((A, B), (shared_A, shared_B)) in enumerate(pairs):
            A.copy_(torch.diag(u[i * R : (i + 1) * R]) @ shared_A)
            B.copy_(torch.diag(v[i * D : (i + 1) * D]) @ shared_B)
    expected = logits(plain, batch())
    assert torch.allclose(logits(loop.model, batch()), expected, atol=1e-5)
    loop.tuner.finish()
    assert torch.allclose(logits(loop.model, batch()), expected, atol=1e-5)
    assert all(a.tied is None for a in adapters(loop.model))
    assert not [name for name, _ in loop.model.named_parameters() if "form_" in name]
    assert wl.export(loop.model, tmp_path / "out", "portable").max_difference < 1e-5


def test_vectors_have_the_gradients_of_the_loss() -> None:
    model = Loop.start(TiedLoRA()).model
    warm(model.double()).eval()
    u, v = vectors(model)
    model.zero_grad()
    model(**batch()).loss.backward()
    for vector in (u, v):
        assert vector.grad is not None
        for i in (0, vector.numel() - 1):
            losses = []
            for step in (1e-5, -2e-5):
                with torch.no_grad():
                    vector[i] += step
                    losses.append(model(**batch()).loss.item())
            with torch.no_grad():
                vector[i] += 1e-5
            assert float(vector.grad[i]) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4, abs=1e-8)


def test_all_four_learn_and_tl5_stays_shared(tmp_path: Path) -> None:
    loop = Loop.start(TiedLoRA()).run(STEPS)
    u, v = vectors(loop.model)
    assert bool((u != 1).all())
    assert bool((v != 1).all())
    five = Loop.start(TiedLoRA(variant="tl5")).run(STEPS)
    five.tuner.finish()
    assert len({id(A) for A, _ in parameters(five.model, "default").values()}) == 3
    assert max_difference(adapter_state(five.model), adapter_state(loop.model)) > 1e-3
    assert wl.export(five.model, tmp_path / "out").max_difference < 1e-5


def test_settings_and_budget() -> None:
    with pytest.raises(ConfigError, match="variant='tl4' is unknown; use one of tl6, tl5"):
        TiedLoRA(variant="tl4")
    shapes = [(16, 16)] * 6
    assert TiedLoRA(variant="tl5").within(6 * 32 * 4, shapes, 8)[1] == 4
    assert TiedLoRA().within(6 * (32 * 4 + 4 + 16), shapes, 8)[1] == 4
    with pytest.raises(ConfigError, match="100 parameters are too few for tied_lora of rank 1 on 6 layers; use at"):
        TiedLoRA().within(100, shapes, 8)
