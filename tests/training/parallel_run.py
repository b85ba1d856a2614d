"""Run by several processes at once: one fit under data parallelism; every process writes what it ended with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tests.builders import adapter_state, lora, trainer

from weightlora.methods import WeightLoRAPlus
from weightlora.training import fit

METHOD = WeightLoRAPlus.from_preset("paper", k=2, warmup_steps=5)


def run(out: Path, size: int) -> None:
    # Where a model takes a count of items and ignores it, as BERT does, Transformers multiplies the loss by the number
    # of processes; without averaging over tokens it does not.
    options = {"average_tokens_across_devices": False, "save_strategy": "steps", "save_steps": 4}
    made = trainer(out / "run", lora(dropout=0.0).double(), per_device_train_batch_size=size, **options)
    result = fit(made, METHOD, measure=False)
    rank = made.args.process_index
    assert result.selection is not None
    (out / f"selection-{rank}.json").write_text(result.selection.to_json())
    (out / f"seen-{rank}.json").write_text(json.dumps([made.args.world_size, made.state.global_step]))
    torch.save(adapter_state(made.model), out / f"adapter-{rank}.pt")


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
    torch.distributed.destroy_process_group()
