"""Methods that look at held-out rows: a run resumed before or after the seam ends where the uninterrupted one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.builders import adapter_state, lora, max_difference, trainer

from weightlora.graft import adapters
from weightlora.methods import ALoRA, Flexora, LoRADrop, Method
from weightlora.training import fit

MADE: list[Method] = [
    LoRADrop(warmup_steps=5, threshold=1e-6, batches=2),
    Flexora(warmup_steps=5, batches=2),
    ALoRA(warmup_steps=2, round_steps=2, rounds=3, moves=3),
]


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.name)
def test_resume_before_and_after_the_seam(made: Method, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"steps": 10, "count": 40, "save_strategy": "steps", "save_steps": 1}
    whole = trainer(tmp_path, lora(layers=3), **arguments)
    done = fit(whole, made, measure=False)
    for cut in (3, 7):
        again = trainer(tmp_path, lora(layers=3), **arguments)
        result = fit(again, made, resume=tmp_path / f"checkpoint-{cut}", measure=False)
        assert result.selection == done.selection
        assert adapters(again.model) == adapters(whole.model)
        assert max_difference(adapter_state(again.model), adapter_state(whole.model)) == 0.0
