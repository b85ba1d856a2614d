"""What the Triton kernels are on real devices, from machine code compiled here: no device is needed.

    python benchmarks/gpu_binaries.py
    python benchmarks/gpu_binaries.py --target sm_90 --dtype bfloat16

Every kernel x dtypes x dropout x rank block that a run can launch, for compute capability 8.0 and 9.0 and for AMD's
gfx942: registers, spills, shared memory, matrix instructions, and how many instructions the loop has for each entry.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from adapter_path import write
from benchlib.binaries import TARGETS, build, compiles_for, every_variant, kernels_sha256, read

OUT = Path(__file__).parent / "results" / "gpu-binaries.json"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS))
    parser.add_argument("--dtype", help="of the base: these variants alone")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    rows: list[dict[str, Any]] = []
    for target in args.target:
        if not compiles_for(target):
            print(f"{target}: this Triton has no compiler for it")
            continue
        for variant in every_variant():
            if args.dtype in (None, variant.x):
                found = read(build(variant, target), variant, target)
                rows.append({"target": target, **asdict(variant), **found})
                print(*rows[-1].values(), flush=True)
    result = {"benchmark": "gpu_binaries", "triton": triton.__version__, "kernels_sha256": kernels_sha256(),
              "spilling": sum(row["spilled_bytes"] > 0 for row in rows), "rows": rows}  # fmt: skip
    write(args.out, result)
    print(f"{len(rows)} binaries, {result['spilling']} of which spill registers")
    return result


if __name__ == "__main__":
    main()
