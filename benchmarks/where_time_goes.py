"""Which operations an adapter path's step spends its time in: bare base, free adapters, stock PEFT, ours.

    python benchmarks/where_time_goes.py --shape deberta-v3-base

Three sums per row, of every operation's own time, each the least of several steps: what the bare base does too; what
differentiating the adapted outputs adds, whoever computes the adapters (the row "free" of adapter_path.py); and what
the adapters' own arithmetic adds. Times are of one run: only their ratios mean something.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from adapter_path import Bench, parse, provenance, write
from benchlib.shapes import SHAPES

Key = tuple[str, str]  # an operation's name, its inputs' shapes
ROWS = ("bare", "free", "stock", "ours")


def operations(bench: Bench, rounds: int) -> dict[str, dict[Key, tuple[float, int]]]:
    """Own microseconds and calls of every operation of a row's step: the least of `rounds`, rows taking turns."""
    best: dict[str, dict[Key, tuple[float, int]]] = {row: {} for row in ROWS}
    for _ in range(rounds):
        for row in ROWS:
            with bench.rows()[row]():
                bench.step()
                with torch.profiler.profile(record_shapes=True) as profile:
                    bench.step()
            for event in profile.key_averages(group_by_input_shape=True):
                key = (event.key, str(event.input_shapes))
                took = (event.self_cpu_time_total, event.count)
                best[row][key] = min(took, best[row].get(key, took))
    return best


def split(best: dict[str, dict[Key, tuple[float, int]]]) -> dict[str, dict[str, float]]:
    """Seconds of every row by what asks for the operation: base, differentiated outputs, adapters."""
    kinds = {key: "base" for key in best["bare"]}
    kinds = {key: "outputs" for key in best["free"]} | kinds
    sums: dict[str, dict[str, float]] = {}
    for row, found in best.items():
        total: defaultdict[str, float] = defaultdict(float)
        for key, (took, _) in found.items():
            total[kinds.get(key, "adapters")] += took / 1e6
        sums[row] = dict(total) | {"all": sum(total.values())}
    return sums


def largest(best: dict[str, dict[Key, tuple[float, int]]], row: str, count: int) -> list[dict[str, Any]]:
    """The operations of a row in which it differs most from the bare base."""
    bare = best["bare"]
    more = {key: took - bare.get(key, (0.0, 0))[0] for key, (took, _) in best[row].items()}
    names = sorted(more, key=lambda key: -more[key])[:count]
    return [{"operation": k[0], "shapes": k[1], "ms_more": more[k] / 1e3, "calls": best[row][k][1]} for k in names]


def main() -> None:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--rounds", type=int, default=4, help="profiled steps of every row")
    mine, rest = own.parse_known_args()
    args = parse(rest)
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(SHAPES[args.shape], args)
    best = operations(bench, mine.rounds)
    sums = split(best)
    for row, parts in sums.items():
        print(f"{row:6}" + "".join(f"  {kind} {seconds:7.3f} s" for kind, seconds in parts.items()), flush=True)
    result = {"seconds": sums, "more_than_bare": {row: largest(best, row, 12) for row in ("free", "stock", "ours")}}
    path = args.out or Path(__file__).parent / "results" / f"where-time-goes-{args.shape}-{args.device}.json"
    write(path, {"provenance": provenance(args) | {"rounds": mine.rounds}, **result})


if __name__ == "__main__":
    main()
