"""Kills runs at random moments, resumes them, and compares what they end with to the run that was let alone.

    python benchmarks/kills.py --data-dir DATA --count 240 --seed 0

Every method in turn. Each run gets one to three deaths, at events of the file system or optimizer steps drawn at
random, some a few milliseconds later, in the middle of whatever happens then: by SIGKILL, by SIGTERM, or by SIGALRM,
which ends a process as abruptly. A run that is not equal to the byte in the end, or that leaves temporary files, is a
finding. The result goes to ``benchmarks/results/kills.json``.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapter_path import write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the machinery is that of the tests

from tests.runs.commands import TINY, copy_data  # noqa: E402
from tests.runs.killed_run import life, prepare  # noqa: E402
from tests.runs.test_runs_killed import LONGER, STEPS, differences, outcome  # noqa: E402

from weightlora.methods import METHODS  # noqa: E402
from weightlora.runs.record import collect_versions, machine  # noqa: E402
from weightlora.training.identity import IN_USE  # noqa: E402

SIGNALS = ("SIGKILL", "SIGTERM", "SIGALRM")


def flags(method: str, data: Path, seed: int) -> list[str]:
    """A run of a few steps with a checkpoint at every second."""
    words = ["--task", "sst2", "--data-dir", str(data), *TINY, "--max-steps", str(LONGER.get(method, STEPS))]
    words += ["--save-steps", "2", "--logging-steps", "1", "--lr-scheduler-type", "constant", "--learning-rate", "1e-2"]
    return [*words, "--method", method, "--k", "3", "--seed", str(seed)]


def deaths(draw: random.Random, events: int) -> list[tuple[str, int, float, str]]:
    """One to three: the number of an event, counted anew in every process, a delay in seconds, and the signal."""
    found = []
    for _ in range(draw.randint(1, 3)):
        delay = draw.choice([0.0, 0.0, draw.uniform(0.0005, 0.02)])
        signal = "SIGALRM" if delay else draw.choice(SIGNALS[:2])
        found.append(("", draw.randint(1, events), delay, signal))
    return found


def compared(method: str, run: Path, whole: dict[str, Any]) -> list[str]:
    """What differs from the run that was let alone, and temporary files that are left."""
    mine = outcome(run)
    if method == "dora":  # PEFT's own DoRA keeps parts of a graph, not always the same ones; see docs/log.md
        for phase in (*mine["phases"], *whole["phases"]):
            phase["kept_activation_bytes"] = None
    left = [str(path.relative_to(run)) for path in run.rglob(".*") if path.suffix != ".lock" and path.name != IN_USE]
    return differences(mine, whole) + [f"left {name}" for name in left]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--count", type=int, default=240, help="deaths, at least")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not (args.data_dir / "sst2").is_dir():
        print(f"SKIPPED: {args.data_dir}/sst2 is not there; name the folder with --data-dir")
        return 0
    prepare()
    draw, began = random.Random(args.seed), time.perf_counter()
    died: Counter[str] = Counter()
    methods: Counter[str] = Counter()
    findings: list[dict[str, Any]] = []
    runs = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = copy_data(args.data_dir, folder / "data", ["sst2"])
        while sum(died.values()) < args.count:
            for method in (name for name, kind in METHODS.items() if kind.learns):
                seed = draw.randrange(1000)
                words = ["train", *flags(method, data, seed), "--out"]
                (alone,) = life({"out": str(folder / "whole"), "train": [*words, str(folder / "whole")], "kills": []})[
                    "tries"
                ]
                whole = outcome(folder / "whole")
                for number in range(2):
                    run, kills = folder / f"killed-{number}", deaths(draw, len(alone["events"]))
                    done = life({"out": str(run), "train": [*words, str(run)], "kills": kills})
                    hit = [kill for kill, one in zip(kills, done["tries"], strict=False) if one["signal"]]
                    died.update(kill[3] for kill in hit)
                    methods[method] += len(hit)
                    runs += 1
                    # Killed after its last word, a run is finished, and `resume` says so and exits with 2.
                    ended = done["tries"][-1]["code"] == 0 or "holds a finished run" in done["output"][-300:]
                    wrong = compared(method, run, whole) if ended else [f"ended badly: {done['output'][-800:]}"]
                    if wrong:
                        findings.append({"method": method, "seed": seed, "kills": kills, "wrong": wrong})
                        print(f"FINDING {findings[-1]}", flush=True)
                for path in (*folder.glob("killed-*"), *folder.glob("whole*")):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            print(f"{sum(died.values())} deaths in {runs} runs, {len(findings)} findings", flush=True)
    result = {
        "benchmark": "kills", "command": f"python benchmarks/kills.py --count {args.count} --seed {args.seed}",
        "deaths": dict(died), "by_method": dict(methods), "runs": runs, "findings": findings,
        "seconds": round(time.perf_counter() - began), "versions": collect_versions(), "machine": machine(),
    }  # fmt: skip
    write(ROOT / "benchmarks" / "results" / "kills.json", result)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
