"""Gathers folders of `weightlora compare` into one table: each method at the best of its learning rates.

    weightlora compare --methods METHODS --task docstrings --tune 1,3 --metric eval_loss ... --out runs/FIRST
    python benchmarks/one_budget.py runs/FIRST runs/SECOND ...

The comparisons' commands are in ``benchmarks/results/methods-tuned-100-steps-docstrings.json``, which this rewrites;
it gets no other from the folders. A method may be tuned in several folders, with other rates in each: what counts is
its final run at the best of all. A final run at another rate is named and left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapter_path import write
from weightlora.report.runfiles import RECORD, TUNING

RESULT = Path(__file__).parent / "results" / "methods-tuned-100-steps-docstrings.json"


def run_of(path: Path) -> dict[str, Any]:
    """One run: its method, its rate, and what it came to."""
    record = json.loads(path.read_text())
    if record["status"] != "ok":
        raise SystemExit(f"{path}: the run did not end well: {record['error']}")
    found = {"method": record["method"], "preset": record["preset"].split(",")[0]}
    found["learning_rate"] = record["config"]["training"]["learning_rate"]
    return found | {key: record["metrics"][key] for key in ("accuracy", "eval_loss")} | {"record": record}


def gathered(folders: Sequence[Path]) -> dict[str, Any]:
    """All methods, the least held-out loss first, and every rate that was tried."""
    found = sorted((path, folder) for folder in folders for path in folder.rglob(RECORD))
    trials = {path: TUNING in path.relative_to(folder).parts for path, folder in found}
    tuning = [run_of(path) for path, trial in trials.items() if trial]
    finals = [run_of(path) for path, trial in trials.items() if not trial]
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for one in sorted(tuning, key=lambda one: -float(one["eval_loss"])):
        best[one["method"], one["preset"]] = one
    rows = []
    for one in sorted(finals, key=lambda one: float(one["eval_loss"])):
        tuned = best.get((one["method"], one["preset"]))
        if tuned is not None and tuned["learning_rate"] != one["learning_rate"]:
            print(f"left out: {one['method']} at {one['learning_rate']}; its best is {tuned['learning_rate']}")
            continue
        record = one["record"]
        budget = record.get("budget") or {}
        params = {f"{name}_params": budget.get(name) for name in ("effective", "peak")}
        alive = {"adapters": len(record["kept"])}
        rows.append(one | alive | params | {"unmet": record.get("unmet", ""), "tuned": bool(tuned)})
    order = [(one["method"], one["preset"]) for one in rows]
    if missing := best.keys() - set(order):
        raise SystemExit(f"tuned, and not run at its best rate: {', '.join(sorted(m for m, _ in missing))}")
    tuning.sort(key=lambda one: (order.index((one["method"], one["preset"])), one["learning_rate"]))
    last = rows[-1]["record"]
    return {
        "rows_that_judge": last["scored_on"]["rows"],
        "rows_that_choose": tuning[-1]["record"]["scored_on"]["rows"],
        "ran_with": {"versions": last["versions"], "machine": last["machine"]},
        "tuning": [_without_record(one) for one in tuning],
        "rows": [_without_record(one) for one in rows],
    }


def _without_record(one: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in one.items() if key != "record"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="that `weightlora compare` wrote")
    args = parser.parse_args(argv)
    old = json.loads(RESULT.read_text())
    write(RESULT, old | gathered(args.folders))
    return 0


if __name__ == "__main__":
    sys.exit(main())
