"""The architectures under a trainer: a run resumed from a checkpoint ends where the uninterrupted one does."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.builders import adapter_state, batch, logits, lora, max_difference, trainer

import weightlora as wl
from weightlora.graft import adapters
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
