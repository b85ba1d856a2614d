"""What each device sends in a step of parallel training, by method: a model of the collectives, from one trace a model.

    python benchmarks/parallel_model.py
    python benchmarks/parallel_model.py --model llama-3-8b --devices 8

LoRA on all linear layers (and every method before the seam), a quarter of them after it: spread down to the first
block, the deepest, the deepest grown to the parameters of all; and full fine-tuning. Nothing here was measured; what
FSDP2 gathers and scatters was compared with its own collectives on small models (tests/cost/test_cost_parallel.py).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adapter_path import write
from weightlora.cost import PlanConfig, Planner
from weightlora.cost.parallel import Parallel, traffic
from weightlora.runs.plan import planner_for
from weightlora.tasks.shapes import PUBLISHED

LARGEST = "llama-3.1-405b"
SIZES = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}


def planner(name: str, length: int) -> Planner:
    config = PlanConfig(model=name, k=0.25, length=length, batch=1, dtype="bfloat16", gated=False)
    if name != LARGEST:
        return planner_for(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({**PUBLISHED["llama-3.1-70b"], **SIZES}))
        return planner_for(replace(config, model=str(path)))


def rows(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    plans = planner(name, args.length)
    deepest = plans.trace.deepest(plans.k)
    phases = {
        "lora, or before the seam": plans.warmup(),
        "a quarter, spread": plans.final(),
        "a quarter, the deepest": plans.final(deepest),
        "a quarter, the deepest, grown": plans.final(deepest, r=4 * plans.config.r),
    }
    moved = {key: plans.estimate.moved(phase) for key, phase in phases.items()}
    bare = plans.estimate.moved(replace(plans.warmup(), live=()))
    moved["full fine-tuning"] = replace(bare, lowest=0, gradients=bare.blocks, rest=bare.outside)
    return [
        {"model": name, "devices": devices, "sharding": sharding, "row": key, **asdict(found), "total": found.total}
        for devices in args.devices
        for sharding in ("ddp", "fsdp", "zero3")
        for key, what in moved.items()
        for found in [traffic(Parallel(devices=devices, sharding=sharding), what, accumulation=1)]
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["llama-3-8b", "llama-3.1-70b", LARGEST])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64, 1024])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "parallel-model.json")
    args = parser.parse_args(argv)
    found = [row for name in args.model for row in rows(name, args)]
    for row in found:
        print(f"{row['model']:16} {row['devices']:5} {row['sharding']:6} {row['row']:30}"
              f" {row['gathered'] / 2**30:9.2f} GiB gathered, {row['reduced'] / 2**20:10.1f} MiB reduced,"
              f" {row['gathers'] + row['reductions']:5} collectives", flush=True)  # fmt: skip
    result = {"benchmark": "parallel_model", "length": args.length, "rows": found}
    write(args.out, result)
    return result


if __name__ == "__main__":
    main()
