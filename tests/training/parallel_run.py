"""Run by several processes at once: one fit under data parallelism; every process writes what it ended with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tests.builders import adapter_state, lora, trainer

from weightlora.methods import Flexora, Method, WeightLoRAPlus
from weightlora.training import fit

METHODS: dict[str, Method] = {
    "weightlora+": WeightLoRAPlus.from_preset("paper", k=2, warmup_steps=5),
    "flexora": Flexora(warmup_steps=5, batches=2),  # it looks at rows that no process trains on
}


def run(name: str, out: Path, size: int) -> None:
    # Where a model takes a count of items and ignores it, as BERT does, Transformers multiplies the loss by the number
    # of processes; without averaging over tokens it does not.
    options = {"average_tokens_across_devices": False, "save_strategy": "steps", "save_steps": 4}
    # 8 rows of 40 are held out by a method that asks for some: 32 are left, which both ways of splitting share evenly.
    held_out = METHODS[name].held_out_batches
    made = trainer(
        out / "run", lora(dropout=0.0).double(), count=40 if held_out else 32, per_device_train_batch_size=size,
        per_device_eval_batch_size=4, **options,
    )  # fmt: skip
    result = fit(made, METHODS[name], measure=False)
    rank = made.args.process_index
    assert result.selection is not None
    (out / f"selection-{rank}.json").write_text(result.selection.to_json())
    (out / f"seen-{rank}.json").write_text(json.dumps([made.args.world_size, made.state.global_step]))
    torch.save(adapter_state(made.model), out / f"adapter-{rank}.pt")


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    torch.distributed.destroy_process_group()
