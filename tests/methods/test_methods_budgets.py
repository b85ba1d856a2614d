"""A budget of adapter parameters is spent: at the end to within 5%, never above it; the peak is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.builders import batch, batches, lora
from tests.methods.test_methods_battery import HELD_OUT

import weightlora as wl
from weightlora.core.budget import affordable
from weightlora.graft.adapters import adapters
from weightlora.training import attach

TARGETS, STEPS, BUDGET = ["query", "value", "intermediate.dense"], 14, 2700  # a rank costs 32, 32 and 48, in 4 layers
SHAPES = [(16, 16), (16, 16), (16, 32)] * 4
KINDS = ["query", "value", "dense"] * 4
MADE: dict[str, wl.Method] = {
    "lora": wl.LoRA(),
    "adalora": wl.AdaLoRA(tinit=2, tfinal=6, deltaT=1),
    "adalora, E to the end": wl.AdaLoRA(tinit=2, tfinal=6, deltaT=1, shrink=False),
    "dynamic_lora": wl.DynamicLoRA(tinit=2, tfinal=6, deltaT=1),
    "increlora": wl.IncreLoRA(init_warmup=1, incre_interval=1, top_h=6),
    "increlora, E to the end": wl.IncreLoRA(init_warmup=1, incre_interval=1, top_h=6, shrink=False),
    "alora": wl.ALoRA(select_after=2, round_steps=1, rounds=5, moves=6),
    "flexora": wl.Flexora(select_after=6, outer_batches=2),
    "lora_drop": wl.LoRADrop(select_after=6, threshold=0.6),
    "tied_lora": wl.TiedLoRA(),
    "tied_lora, A and B alone": wl.TiedLoRA(variant="tl5"),
}


@pytest.mark.parametrize("name", MADE)
def test_a_budget_is_spent(name: str) -> None:
    made, rank = MADE[name].within(BUDGET, SHAPES, 8, KINDS)
    model: Any = lora(layers=4, rank=rank, targets=TARGETS, dropout=0.0)
    scales = {a.scale for a in adapters(model)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tuner = attach(model.train(), made, optimizer, max_steps=STEPS, held_out=HELD_OUT)
    for _, inputs in zip(range(STEPS), batches(), strict=False):
        model(**inputs).loss.backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
    tuner.finish()
    counts, live = tuner._driver.counts, adapters(model)
    assert 0.95 * BUDGET <= counts["effective"] <= BUDGET
    assert counts["effective"] <= counts["peak"] <= counts["allocated"] or name in ("flexora", "lora_drop")
    plain = sum(a.rank * (a.d_in + a.d_out) for a in live if a.tied is None)
    if not name.startswith("tied") and "E to the end" not in name:
        assert plain == counts["effective"]
    if not name.startswith(("adalora", "dynamic", "increlora")):
        assert {a.scale for a in live} == scales
        assert counts["peak"] <= 1.05 * BUDGET
    model(**batch()).loss.backward()  # what is left still trains


def test_increloras_peak_counts_what_learns_and_not_what_is_allocated() -> None:
    made, rank = MADE["increlora"].within(BUDGET, SHAPES, 8, KINDS)
    model: Any = lora(layers=4, rank=rank, targets=TARGETS, dropout=0.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tuner = attach(model.train(), made, optimizer, max_steps=STEPS)
    driver, most = tuner._driver, 0
    for _, inputs in zip(range(STEPS), batches(), strict=False):
        if tuner.selection is None:  # rows of A with a gradient, by hand
            model(**inputs).loss.backward()
            rows = [(A.grad.abs().sum(1) > 0).sum() * (A.shape[1] + B.shape[0]) for A, B in driver._factors]  # type: ignore[union-attr]
            gates: Any = driver.formed and driver.formed.form
            most = max(most, int(sum(rows)) + int(gates.open.sum()))
            optimizer.step()
            tuner.step()
            optimizer.zero_grad()
    tuner.finish()
    assert driver.counts["peak"] == pytest.approx(most, rel=0.06)  # at E = 0, in the first step, A has no gradient
    assert driver.counts["peak"] < driver.counts["allocated"]


def test_the_dearest_that_fits_and_no_more() -> None:
    assert affordable([3, 2, 1, 0], [1, 2, 3, 4], 4) == [3]
    assert affordable([0, 1, 2, 3], [1, 2, 3, 4], 6) == [0, 1, 2]
    assert affordable([1, 3, 0, 2], [1, 2, 3, 4], 9) == [0, 1, 3]


def test_tied_lora_counts_what_layers_share() -> None:
    """MiniLM's 36 linear layers at 166,000: rank 20, not the 5 that fit where none are shared."""
    shapes = [*[(384, 384)] * 4, (384, 1536), (1536, 384)] * 6
    kinds = ["query", "key", "value", "dense", "dense", "dense"] * 6
    assert wl.TiedLoRA().within(166_000, shapes, 8, kinds)[1] == 20
