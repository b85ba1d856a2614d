"""What the planner predicts, from weights that are not there, beside what autograd holds on the real model.

    python benchmarks/plan_accuracy.py
    python benchmarks/plan_accuracy.py --shape deberta-v3-base --batch 8

Every row is one set of live adapters, dtype of the base, dropout of the adapters, with and without checkpointing. The
prediction comes from one traced forward of the model on the meta device, with a prime number of rows, scaled to the
batch; the count from a forward on real weights, adapters outside the set really disconnected. With CUDA also the peak
of a whole step with AdamW, beside the planner's total.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from adapter_path import Bench, provenance, write
from benchlib.shapes import SHAPES, Shape, build, resized
from memory_vs_adapters import peak
from weightlora.cost import Estimate, Phase, Setting, Traced
from weightlora.cost.measure import kept_bytes
from weightlora.graft.adapters import adapters
from weightlora.graft.depth import checkpoint_blocks, end_backward_at_lowest

DEFAULT = ("minilm", "deberta-v3-base", "bart-large", "llama-512")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
K = 5


def predicted(shape: Shape, args: argparse.Namespace) -> tuple[Traced, float]:
    """The planner's trace of a shape, and the seconds it took."""
    began = time.perf_counter()
    bare, _ = build(shape, "meta", args.seed)
    pattern = rf".*\.(?:{'|'.join(shape.targets)})"
    config = LoraConfig(r=args.rank, lora_dropout=args.dropout, target_modules=pattern)
    model = get_peft_model(bare, config)

    def loss(size: int) -> Callable[[], Tensor]:
        ids = torch.full((size, shape.length), 5)
        labels = torch.zeros(size, dtype=torch.long) if shape.model.endswith("Classification") else ids
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

        def run() -> Tensor:
            found: Tensor = model(**batch).loss
            return found

        return run

    traced = Traced.of(model, loss, length=shape.length, cuda=args.device.startswith("cuda"))
    return traced, round(time.perf_counter() - began, 2)


def sets(bench: Bench) -> dict[str, Sequence[str]]:
    names = list(bench.layers)
    return {"all": names, "random": bench.random, "deepest": names[-K:], "lowest": names[:1]}


def rows(name: str, shape: Shape, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    traced, seconds = predicted(shape, args)
    bench = Bench(shape, args)
    index = {adapter.name: adapter.index for adapter in adapters(bench.model)}
    base: Any = bench.root
    for checkpointing in (False, True):
        estimate = Estimate(traced.model, traced.at, Setting(checkpointing=checkpointing))
        if checkpointing:
            checkpoint_blocks(base)
            end_backward_at_lowest(bench.model)
        for kind, live in sets(bench).items():
            phase = Phase(name=kind, live=tuple(sorted(index[n] for n in live)))
            with bench.ours(live):
                counted = kept_bytes(bench.model, bench.loss)
                measured = peak(bench, live) if args.device.startswith("cuda") else None
            said = estimate.activations(phase, shape.batch)
            row = {
                "shape": name, "live": kind, "k": len(live), "dtype": str(shape.dtype).removeprefix("torch."),
                "dropout": args.dropout, "checkpointing": checkpointing, "predicted_bytes": said,
                "counted_bytes": counted, "error": said / counted - 1, "trace_seconds": seconds,
            }  # fmt: skip
            if measured is not None:
                row |= {"predicted_total_bytes": estimate.cost(phase, shape.batch).total, "peak_bytes": measured}
            yield row


def show(row: dict[str, Any]) -> None:
    line = (
        f"{row['shape']:16} {row['live']:8} {row['dtype']:9} dropout {row['dropout']:<5}"
        f" {'checkpointed' if row['checkpointing'] else '':12} predicted {row['predicted_bytes'] / 2**20:9.2f} MiB,"
        f" counted {row['counted_bytes'] / 2**20:9.2f} MiB, {row['error']:+.3%}"
    )
    if "peak_bytes" in row:
        line += f"  total {row['predicted_total_bytes'] / 2**30:.2f} GiB, peak {row['peak_bytes'] / 2**30:.2f} GiB"
    print(line, flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), nargs="+", default=list(DEFAULT))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    vars(args).update(
        engine="autograd", adapter_dtype="float32", autocast=False, k_random=K, k_deepest=K, names=None, dropout=0.0
    )
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    found: list[dict[str, Any]] = []
    for name in args.shape:
        for dtype in DTYPES.values():
            for args.dropout in (0.0, 0.05):
                shape = resized(SHAPES[name], {}, layers=args.layers, batch=args.batch, length=args.length)
                for row in rows(name, replace(shape, dtype=dtype), args):
                    found.append(row)
                    show(row)
    worst = max(abs(row["error"]) for row in found)
    print(f"largest error of {len(found)} rows: {worst:.3%}")
    result = {"benchmark": "plan_accuracy", "device": args.device, "largest_error": worst, "rows": found,
              "provenance": provenance(args)}  # fmt: skip
    out = args.out or Path(__file__).parent / "results" / f"plan-accuracy-{args.device.split(':')[0]}.json"
    write(out, result)
    return result


if __name__ == "__main__":
    main()
