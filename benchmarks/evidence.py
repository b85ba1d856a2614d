"""Is the selection worth its name? Every method tuned alike, five seeds, differences paired over seeds.

    python benchmarks/evidence.py run --data-dir DATA --tasks sst2,stsb,mrpc
    python benchmarks/evidence.py show

``run`` goes through the stages below, the most telling first; what is finished is not run again, so it can be stopped
at any time. ``show`` reads what there is, writes ``benchmarks/results/evidence.json`` and prints the tables.

The learning rate of each method is chosen once per task, with K = 10 and rank 8, on a held-out tenth of the training
rows, and used for all its K and ranks. The scale alpha / r is 4 throughout.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightlora.runs.config import RunConfig
from weightlora.runs.jobs import Job, execute, on_training_rows, run_name

RATES = (3e-3, 1e-3, 3e-4)
HOLDOUT = 0.1
SEEDS = (0, 1, 2, 3, 4)
TRAINING = {
    "max_steps": 300,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "train_sampling_strategy": "group_by_length",
    "bf16": True,
    "use_cpu": True,
}
SELECTORS = ("weightlora", "random", "top", "gradient")

Row = tuple[str, int | None, int, str | None]  # method or method:preset, K, rank, score
STAGES: dict[str, list[Row]] = {
    "K=10": [("lora", None, 8, None), *((name, 10, 8, None) for name in SELECTORS)],
    "K=5": [(name, 5, 8, None) for name in SELECTORS],
    "growth": [("weightlora+", 10, 8, None), ("weightlora+", 10, 2, None), ("lora", None, 2, None)],
    "K=1": [(name, 1, 8, None) for name in SELECTORS],
    "rules": [("weightlora", 5, 8, "coverage"), ("weightlora:paper", 10, 8, None)],
    "ranks": [(name, k, r, None) for r in (1, 4) for name, k in (("lora", None), ("weightlora+", 10))],
}


def label(row: Row) -> str:
    """A row's name in tables and files."""
    name, k, rank, score = row
    return name + (f" {score}" if score else "") + (f", K={k}" if k else "") + f", r={rank}"


def config(task: str, data_dir: str, row: Row, rate: float, seed: int) -> RunConfig:
    """One run of a row."""
    name, k, rank, score = row
    method, _, preset = name.partition(":")
    settings: dict[str, Any] = {} if k is None else {"k": k}
    if score:
        settings["score"] = score
    return RunConfig(
        task=task, data_dir=data_dir, model="minilm", max_train_samples=6000, r=rank, alpha=4.0 * rank, method=method,
        preset=preset or "recommended", settings=settings, seed=seed, training={**TRAINING, "learning_rate": rate},
    )  # fmt: skip


def tuned(task: str, row: Row) -> Row:
    """The row whose learning rate this one uses: the same method and rule with K = 10 and rank 8."""
    name, k, _, score = row
    return name, k and 10, 8, score


def rate_of(task: str, args: argparse.Namespace, row: Row) -> float:
    """The learning rate of a row's method on this task: from the highest down, until a lower one is worse."""
    row = tuned(task, row)
    best: tuple[float, float] | None = None
    for rate in RATES:
        trial = on_training_rows(config(task, args.data_dir, row, rate, seed=0), HOLDOUT)
        job = _job(trial, args.out / "tune", f"tuning {label(row)}, rate {rate:g}")
        (record,) = execute([job], quiet=True, say=say)
        score = record.score if record.status == "ok" and record.score is not None else -math.inf
        if best is not None and score < best[0]:
            break
        best = score, rate
    assert best is not None
    return best[1]


def run(args: argparse.Namespace) -> None:
    """Every stage, row, task and seed that is not there yet."""
    for stage in args.stages or STAGES:
        for row in STAGES[stage]:
            for task in args.tasks:
                rate = rate_of(task, args, row)
                runs = [config(task, args.data_dir, row, rate, seed) for seed in SEEDS]
                execute([_job(one, args.out / "runs", label(row)) for one in runs], quiet=True, say=say)


def _job(one: RunConfig, folder: Path, title: str) -> Job:
    return Job(config=one, folder=folder / run_name(one), title=f"{one.task}, {title}, seed {one.seed}")


def say(line: str) -> None:
    print(line, flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--data-dir", default="../shared/data")
    parser.add_argument("--tasks", default="sst2,stsb,mrpc", type=lambda text: text.split(","))
    parser.add_argument("--stages", default="", type=lambda text: [s for s in text.split(",") if s])
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(parse())
