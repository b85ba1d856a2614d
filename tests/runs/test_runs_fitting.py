"""What fits of a run, judged on its own model and its own longest rows."""

from __future__ import annotations

import pytest
import torch

from weightlora.errors import AdapterError, PlanError
from weightlora.graft import adapters, disconnect, fast_path
from weightlora.runs.build import build
from weightlora.runs.config import RunConfig
from weightlora.runs.fitting import estimate_run, largest_micro_batches, run_phases
from weightlora.training.measure import kept_bytes

CONFIG = RunConfig(
    model="bert-tiny-shape",
    max_train_samples=40,
    max_eval_samples=8,
    settings={"k": 3, "select_after": 4},
    training={"max_steps": 8, "per_device_train_batch_size": 12, "use_cpu": True},
)


def test_the_longest_rows_are_predicted_and_the_model_is_left_alone() -> None:
    parts = build(CONFIG)
    estimate = estimate_run(parts, CONFIG)
    warmup, final = run_phases(parts, CONFIG, estimate)
    assert (len(warmup.live), len(final.live)) == (12, 3)
    lengths = [len(row) for row in parts.train["input_ids"]]
    rows = [parts.train[i] for i in sorted(range(len(lengths)), key=lambda i: -lengths[i])[:4]]
    names = [a.name for a in adapters(parts.model)]
    disconnect(parts.model, [name for i, name in enumerate(names) if i not in final.live])
    fast_path(parts.model)
    batch = parts.prepared.collator(rows)
    kept = kept_bytes(parts.model, lambda: parts.model(**batch).loss)
    assert estimate.activations(final, 4) == pytest.approx(kept, rel=0.01)


def test_the_largest_micro_batches_of_both_phases() -> None:
    parts = build(CONFIG)
    estimate = estimate_run(parts, CONFIG)
    phases = run_phases(parts, CONFIG, estimate)
    whole = estimate.parts(phases[0], 12).total
    assert largest_micro_batches(parts, CONFIG, whole) == {"warmup": 12, "final": 12}
    found = largest_micro_batches(parts, CONFIG, whole - 1)
    assert found["warmup"] == 6
    assert found["final"] in (6, 12)
    with pytest.raises(PlanError, match="phase 'warmup' needs"):
        largest_micro_batches(parts, CONFIG, 2**20)


def test_growth_is_planned_for() -> None:
    """Survivors that spend the whole budget again have wider h, parameters, gradients and moments."""
    grown = CONFIG.with_settings(method="weightlora+")
    parts = build(grown)
    estimate = estimate_run(parts, grown)
    _, final = run_phases(parts, grown, estimate)
    every = estimate.trace.adapters
    spent = sum(a.rank * (a.d_in + a.d_out) for a in every)
    used = sum(final.ranks[i] * (every[i].d_in + every[i].d_out) for i in final.live)
    assert 0.8 * spent < used <= spent


def test_a_method_without_a_seam_has_one_phase() -> None:
    plain = CONFIG.with_settings(method="lora", settings={})
    parts = build(plain)
    before = torch.get_rng_state()
    assert list(largest_micro_batches(parts, plain, 2**30)) == ["final"]
    assert torch.equal(torch.get_rng_state(), before)


def test_full_fine_tuning_is_not_planned() -> None:
    full = CONFIG.with_settings(method="full", settings={})
    with pytest.raises(AdapterError, match="trains no plain LoRA adapters"):
        estimate_run(build(full), full)
