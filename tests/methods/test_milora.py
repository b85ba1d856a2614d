"""MiLoRA against the edited base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.builders import adapter_state, batch, logits, lora, max_difference
from tests.methods.test_methods_battery import STEPS, Loop
from torch import nn

import weightlora as wl
from weightlora.core.factorise import minor_pair
from weightlora.errors import AdapterError
from weightlora.graft.adapters import adapters, layer_weights, parameters
from weightlora.methods import MiLoRA
from weightlora.training import attach


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_pair_is_the_part_along_the_smallest_singular_values(shape: tuple[int, int], scale: float) -> None:
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A, B = minor_pair(W, 3, scale)
    part = scale * B @ A
    every = torch.linalg.svdvals(W)
    assert torch.allclose(torch.linalg.svdvals(part)[:3], every[-3:])
    rest = torch.linalg.svdvals(W - part)
    assert torch.allclose(rest[:5], every[:5])
    assert float(rest[5:].max()) < 1e-12  # the residual has rank min(d) - r
    assert torch.allclose(A @ A.T, B.T @ B)


def test_equals_training_on_the_edited_base(tmp_path: Path) -> None:
    """The method as printed: W loses s B0 A0, LoRA starts at B0 A0, and Adam goes its way."""
    edited = lora(dropout=0.0)
    pairs = list(parameters(edited, "default").values())
    with torch.no_grad():
        for a, (A, B), W in zip(adapters(edited), pairs, layer_weights(edited, "default"), strict=True):
            U, S, Vh = torch.linalg.svd(W)
            root = (S[-4:] / a.scale).sqrt()
            A.copy_(root[:, None] * Vh[-4:])
            B.copy_(U[:, -4:] * root)
            W.sub_(a.scale * B @ A)
    # SGD: it follows the gradient itself, where Adam's first step is its sign, whatever rounding makes of a zero.
    ours = lora(dropout=0.0)
    first, second = (
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05, momentum=0.9) for m in (edited, ours)
    )
    tuner = attach(ours, MiLoRA(), second)
    for step in range(STEPS):
        for model, optimizer in ((edited, first), (ours, second)):
            model.eval()
            model(**batch(seed=step)).loss.backward()
            optimizer.step()
        tuner.step()
        first.zero_grad()
        second.zero_grad()
    tuner.finish()
    expected = logits(edited, batch())
    assert not torch.allclose(expected, logits(lora(), batch()), atol=1e-2)
    assert torch.allclose(logits(ours, batch()), expected, atol=2e-5)
    assert [a.rank for a in adapters(ours)] == [8] * 6
    for mine, untouched in zip(layer_weights(ours, "default"), layer_weights(lora(), "default"), strict=True):
        assert torch.equal(mine, untouched)
    assert wl.export(ours, tmp_path / "out", "portable").max_difference < 1e-5


def test_counts_what_trains() -> None:
    loop = Loop.start(MiLoRA())
    policy = loop.tuner._driver.policy
    assert loop.tuner._driver.counts["trainable"] == 6 * 4 * 32
    loop.run(2).tuner.finish()
    assert policy.setup.count(adapters(loop.model)) == 6 * 4 * 32


def test_a_base_or_a_rank_that_cannot_do_is_refused_and_nothing_is_changed() -> None:
    model = lora()
    before = adapter_state(model)
    last = next(m for name, m in reversed(list(model.named_modules())) if name.endswith("value.base_layer"))
    last.weight = nn.Parameter(last.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(AdapterError, match=r"value is quantised \(torch.float8_e4m3fn, \(16, 16\)\); milora needs"):
        Loop.start(MiLoRA(), model)
    assert max_difference(adapter_state(model), before) == 0.0
    with pytest.raises(
        AdapterError,
        match=r"rank 17 on .*query is more than the 16 singular values of its weight, from which milora starts",
    ):
        Loop.start(MiLoRA(), lora(rank=17))
    with pytest.raises(AdapterError, match=r"query has the scale 0\.0; milora needs lora_alpha above 0"):
        Loop.start(MiLoRA(), lora(lora_alpha=0))
