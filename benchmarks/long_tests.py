"""Run the tests that the suite leaves out for time, and store what came of them.

    python benchmarks/long_tests.py --jobs 2

They are marked ``long``: more of what the suite's tests look at (methods, shapes, kills, other people's programs).
The result goes to ``benchmarks/results/long-tests.json``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from adapter_path import write
from weightlora.runs.record import collect_versions, machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"


def outcomes(junit: Path) -> dict[str, dict[str, int]]:
    """How many tests of each function passed, failed, or were skipped."""
    found: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        ended = {child.tag for child in case} & {"failure", "error", "skipped"}
        name = f"{case.get('classname')}.{str(case.get('name')).partition('[')[0]}"
        found.setdefault(name, Counter())[min(ended, default="passed")] += 1
    return {name: dict(counts) for name, counts in sorted(found.items())}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes of pytest")
    parser.add_argument("--out", type=Path, default=RESULTS / "long-tests.json")
    parser.add_argument("tests", nargs="*", help="files or folders; all of them without")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        words = ["-m", "pytest", "--long", "-m", "long", "-n", str(args.jobs), "--dist", "worksteal", *args.tests]
        began = time.monotonic()
        done = subprocess.run([sys.executable, *words, f"--junitxml={junit}"], cwd=ROOT, check=False)
        seconds = time.monotonic() - began
        if not junit.is_file():
            return done.returncode
        tests = outcomes(junit)
    total: Counter[str] = Counter()
    for counts in tests.values():
        total.update(counts)
    result: dict[str, Any] = {
        "command": " ".join(["python", *words]),
        "total": dict(total),
        "seconds": round(seconds, 1),
        "tests": tests,
        "versions": collect_versions(),
        "machine": machine(),
    }
    write(args.out, result)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
