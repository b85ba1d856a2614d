"""The architectures under a trainer: a run resumed from a checkpoint ends where the uninterrupted one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.builders import adapter_state, batch, logits, lora, max_difference, trainer
from tests.methods.test_methods_battery import Loop

import weightlora as wl
from weightlora.graft.adapters import adapters
from weightlora.methods import MELoRA, Method, MiLoRA, NoRA, TiedLoRA

RANKS = {"melora": 8, "tied_lora": 4, "milora": 8, "nora": 4}


@pytest.mark.parametrize(
    "made",
    [MELoRA(), TiedLoRA(), TiedLoRA(variant="tl5"), MiLoRA(), NoRA(outer_rank=6, calibration_batches=1)],
    ids=["melora", "tl6", "tl5", "milora", "nora"],
)
def test_resumes_to_the_same_adapter(made: Method, tmp_path: Path) -> None:
    whole = trainer(tmp_path, lora(), steps=6, save_strategy="steps", save_steps=3)
    done = wl.fit(whole, made)
    assert [a.rank for a in adapters(done.model)] == [RANKS[made.name]] * 6
    assert float((logits(done.model, batch()) - logits(lora(), batch())).abs().max()) > 1e-3
    again = wl.fit(
        trainer(tmp_path, lora(), steps=6, save_strategy="steps", save_steps=3), made, resume=tmp_path / "checkpoint-3"
    )
    assert max_difference(adapter_state(again.model), adapter_state(done.model)) == 0.0
    assert wl.export(again, tmp_path / "out", "portable").max_difference < 1e-5


@pytest.mark.parametrize("made", [MELoRA(), TiedLoRA(), MiLoRA(), NoRA()], ids=["melora", "tl6", "milora", "nora"])
def test_exports_in_the_middle_and_trains_on(made: Method, tmp_path: Path) -> None:
    loop = Loop.start(made).run(3)
    live = logits(loop.model, batch())
    for profile in ("native", "portable", "merged"):
        assert wl.export(loop.model, tmp_path / profile, profile).max_difference < 1e-5
    assert torch.equal(logits(loop.model, batch()), live)
    loop.run(5).tuner.finish()
    untouched = Loop.start(made).run(5)
    untouched.tuner.finish()
    assert max_difference(adapter_state(loop.model), adapter_state(untouched.model)) == 0.0
