"""Gathers folders of `weightlora compare` into one table: each method at the best of its learning rates.

    weightlora compare --methods METHODS --task docstrings --tune 1,3 --metric eval_loss ... --out runs/FIRST
    python benchmarks/one_budget.py runs/FIRST runs/SECOND ...

The comparisons' commands are in ``benchmarks/results/methods-tuned-100-steps-docstrings.json``, which this rewrites;
it gets no other from the folders. A method may be tuned in several folders, with other rates in each: what counts are
its final runs at the best of all, one for each seed. A final run at another rate is named and left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from adapter_path import write
from weightlora.report.runfiles import RECORD, TUNING

SCORES = ("accuracy", "eval_loss")
LAST = 3
RESULT = Path(__file__).parent / "results" / "methods-tuned-100-steps-docstrings.json"


def run_of(path: Path) -> dict[str, Any]:
    """One run: its method, rate and seed, what it came to, and the record."""
    record = json.loads(path.read_text())
    if record["status"] != "ok":
        raise SystemExit(f"{path}: the run did not end well: {record['error']}")
    found = {"method": record["method"], "preset": record["preset"].split(",")[0]}
    found |= {"learning_rate": record["config"]["training"]["learning_rate"], "seed": record["seed"]}
    return found | {key: record["metrics"][key] for key in SCORES} | {"record": record}


def gathered(folders: Sequence[Path]) -> dict[str, Any]:
    """All methods, the least mean of held-out losses first, and every rate that was tried."""
    found = sorted((path, folder) for folder in folders for path in folder.rglob(RECORD))
    trials = {path: TUNING in path.relative_to(folder).parts for path, folder in found}
    tuning = [run_of(path) for path, trial in trials.items() if trial]
    best: dict[tuple[str, str], float] = {}
    for one in sorted(tuning, key=lambda one: -float(one["eval_loss"])):
        best[_name(one)] = one["learning_rate"]
    runs: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for one in (run_of(path) for path, trial in trials.items() if not trial):
        if one["learning_rate"] == best.get(_name(one), one["learning_rate"]):
            runs.setdefault(_name(one), {})[one["seed"]] = one
        else:
            print(f"left out: {one['method']} at {one['learning_rate']}; its best is {best[_name(one)]}")
    if missing := best.keys() - runs.keys():
        raise SystemExit(f"tuned, and not run at its best rate: {', '.join(sorted(m for m, _ in missing))}")
    rows = [_row([seeds[seed] for seed in sorted(seeds)], name in best) for name, seeds in runs.items()]
    rows.sort(key=lambda row: float(row["eval_loss"]))
    order = [_name(row) for row in rows]
    tuning.sort(key=lambda one: (order.index(_name(one)), one["learning_rate"]))
    last = next(iter(runs[order[-1]].values()))["record"]
    return {
        "rows_that_judge": last["scored_on"]["rows"],
        "rows_that_choose": tuning[-1]["record"]["scored_on"]["rows"],
        "ran_with": {"versions": last["versions"], "machine": last["machine"]},
        "tuning": [{key: value for key, value in one.items() if key != "record"} for one in tuning],
        "rows": rows,
    }


def _name(one: dict[str, Any]) -> tuple[str, str]:
    return one["method"], one["preset"]


def _row(runs: Sequence[dict[str, Any]], tuned: bool) -> dict[str, Any]:
    """A method at its rate: means over seeds, and what each seed came to."""
    row = {key: runs[0][key] for key in ("method", "preset", "learning_rate")} | {"tuned": tuned}
    row |= {key: statistics.fmean(one[key] for one in runs) for key in SCORES}
    each = []
    for one in runs:
        record = one["record"]
        budget = record.get("budget") or {}
        params = {f"{name}_params": budget.get(name) for name in ("effective", "peak")}
        there = {"adapters": len(record["kept"]), **params, "unmet": record.get("unmet", "")}
        each.append({key: one[key] for key in ("seed", *SCORES)} | there)
    return row | {"runs": each}


def noise(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a seed does: the standard deviation of held-out losses, pooled over methods of more than one seed.

    And how alike two seeds order the methods with adapters without the last `LAST` (Spearman): those that learn slowly
    are last with any seed.
    """
    several = [[run["eval_loss"] for run in row["runs"]] for row in rows if len(row["runs"]) > 1]
    spread = math.sqrt(statistics.fmean(statistics.variance(losses) for losses in several))
    ordered = sorted((row for row in rows if row["runs"][0]["adapters"]), key=lambda row: float(row["eval_loss"]))
    pairs = [[run["eval_loss"] for run in row["runs"][:2]] for row in ordered[:-LAST]]
    return {"seed_sd": spread, "spearman_of_two_seeds": float(spearmanr(pairs).statistic)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="that `weightlora compare` wrote")
    args = parser.parse_args(argv)
    old = json.loads(RESULT.read_text())
    new = gathered(args.folders)
    write(RESULT, old | new | noise(new["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
