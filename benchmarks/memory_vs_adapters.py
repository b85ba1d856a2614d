"""Memory against the number of connected adapters (the paper's Figure 3), ours beside stock PEFT's.

    python benchmarks/memory_vs_adapters.py
    python benchmarks/memory_vs_adapters.py --device cuda --batch 64 --length 256

On a CPU: bytes that autograd keeps for backward, plus the adapters' parameters, gradients and Adam moments; both exact.
With CUDA also the peak of one whole training step as the allocator saw it. Two orders of connecting: from the deepest
adapter upwards, and at random.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapter_path import Bench, provenance, shape_of, write
from benchlib.shapes import SHAPES
from weightlora.cost.measure import step_cost
from weightlora.graft.adapters import factors

STATE = 4  # a trained number, its gradient, and Adam's two moments


def counts(n: int, points: int) -> list[int]:
    """About `points` numbers of adapters from 1 to n."""
    return sorted({max(1, round(n * step / (points - 1))) for step in range(points)})


def peak(bench: Bench, live: Sequence[str]) -> int:
    """Peak of the allocator over two whole steps, the optimizer's included."""
    parameters = [factor for name in live for factor in factors(bench.layers[name], "default")]
    optimizer = torch.optim.AdamW(parameters)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        bench.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def points(bench: Bench, number: int) -> list[dict[str, Any]]:
    """One record per path, order and number of connected adapters."""
    names = list(bench.layers)
    orders = {"deepest": names[::-1], "random": random.Random(bench.args.seed).sample(names, len(names))}
    found = []
    for order, sequence in orders.items():
        for k in counts(len(names), number):
            live = sequence[:k]
            trained = sum(f.numel() * f.element_size() for name in live for f in factors(bench.layers[name], "default"))
            for path, row in (("stock", bench.stock), ("ours", bench.ours)):
                with row(live):
                    kept = step_cost(bench.model, bench.loss).kept_activation_bytes
                    record = {"path": path, "order": order, "k": k, "rank": bench.args.rank}
                    record |= {"kept_activation_bytes": kept, "adapter_state_bytes": STATE * trained}
                    if bench.args.device.startswith("cuda"):
                        record["peak_memory_bytes"] = peak(bench, live)
                    found.append(record)
    return found


def draw(records: list[dict[str, Any]], caption: str, path: Path) -> None:
    """A panel per order; a colour per rank; stock dashed, ours solid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = "peak_memory_bytes" in records[0]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, constrained_layout=True)
    ranks = sorted({record["rank"] for record in records})
    for panel, order in zip(panels, ("deepest", "random"), strict=True):
        for rank in ranks:
            for who, style in (("stock", "--"), ("ours", "-")):
                line = [r for r in records if (r["order"], r["rank"], r["path"]) == (order, rank, who)]
                total = [
                    r["peak_memory_bytes"] if measured else r["kept_activation_bytes"] + r["adapter_state_bytes"]
                    for r in line
                ]
                label = f"{'stock PEFT' if who == 'stock' else 'WeightLoRA'}, r = {rank}"
                look = {"color": f"C{ranks.index(rank)}", "linestyle": style, "marker": ".", "label": label}
                panel.plot([r["k"] for r in line], [t / 2**20 for t in total], **look)
        panel.set_title("the deepest K connected" if order == "deepest" else "K at random connected")
        panel.set_xlabel("connected adapters K")
        panel.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("peak memory of a step, MiB" if measured else "kept for backward + adapter state, MiB")
    panels[1].legend(fontsize=8)
    figure.suptitle(caption, fontsize=10)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    temporary.replace(path)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="deberta-v3-base")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--points", type=int, default=7, help="numbers of adapters from 1 to all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--size", nargs="+", metavar="NAME=N", help="other sizes of the model's config, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="of the JSON; the picture lies beside it, as .png")
    args = parser.parse_args(argv)
    vars(args).update(adapter_dtype="float32", autocast=False, k_random=None, k_deepest=None, names=None)
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    records = []
    for rank in args.ranks:
        args.rank = rank
        bench = Bench(shape_of(args), args)
        records += points(bench, args.points)
        print(f"rank {rank}: done", flush=True)
        del bench
    shape = shape_of(args)
    result = {
        "benchmark": "memory_vs_adapters", "shape": args.shape, "device": args.device, "batch": shape.batch,
        "length": shape.length, "dropout": args.dropout, "engine": args.engine, "records": records,
        "provenance": provenance(args),
    }  # fmt: skip
    name = f"memory-vs-adapters-{args.shape}-{args.device.split(':')[0]}"
    out = args.out or Path(__file__).parent / "results" / f"{name}.json"
    write(out, result)
    caption = f"{args.shape}, batch {shape.batch} x {shape.length}, dropout {args.dropout:g}"
    draw(records, caption, out.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
