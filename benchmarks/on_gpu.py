"""Everything that needs a CUDA device, in one visit of at most eight minutes: stages by worth, each with its own limit.

    python benchmarks/on_gpu.py --budget                  # what a visit takes; runs nothing
    bash benchmarks/on_gpu.sh --out visit                 # there: unpacks what was carried, then this
    python benchmarks/on_gpu.py --rehearse --out trial    # here: the same stages on a CPU, with tiny shapes

Each stage is a process of its own and writes its JSON at once; `STAGE.stage.json` says how it ended. What is done is
not run again, so a second visit goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_path import write

HERE = Path(__file__).parent
VISIT = 480
LEAST = 10  # seconds left under which no stage is begun


@dataclass(frozen=True, kw_only=True)
class Stage:
    """``script`` with ``real`` arguments on a device, or ``tiny`` ones on a CPU; killed after ``limit`` seconds."""

    name: str
    why: str
    limit: int
    script: str
    real: str
    tiny: str

    def arguments(self, out: Path, *, rehearse: bool = False) -> list[str]:
        more = f"{self.tiny} --device cpu" if rehearse else f"{self.real} --device cuda"
        return [*more.split(), "--out", str(out / f"{self.name}.json")]


_LLAMA = "--shape llama-3-8b --only bare$ stock$ ours$ ours-gated ours-random ours-deepest --seconds 30"
_TINY = "--shape tiny --seconds 0.1 --engine autograd"
STAGES = (
    Stage(name="check", why="gradients against the formula; graphs; no waiting", limit=30, script="gpu_check.py",
          real="", tiny="--tokens 20 --width 24 --out-width 17 --rank 4"),
    Stage(name="llama-dropout", why="Llama-3-8B, PEFT's defaults: 1.05 x bare, 1.4 x stock?", limit=80,
          script="adapter_path.py", real=f"{_LLAMA} --dropout 0.05", tiny=f"{_TINY} --dropout 0.05"),
    Stage(name="llama", why="the same without dropout", limit=80, script="adapter_path.py",
          real=f"{_LLAMA} --dropout 0", tiny=f"{_TINY} --dropout 0"),
    Stage(name="deberta", why="DeBERTaV3-base, batch 64", limit=40, script="adapter_path.py",
          real="--shape deberta-v3-base --batch 64 --dropout 0.05 --seconds 15 --only bare$ stock$ ours$ ours-deepest",
          tiny="--shape deberta-v3-base --size hidden_size=24 intermediate_size=32 --layers 2 --batch 2 --length 16"
               " --dropout 0.05 --seconds 0.1 --engine autograd"),
    Stage(name="figure3", why="the allocator's peak against the number of adapters", limit=40,
          script="memory_vs_adapters.py", real="--batch 64 --length 256 --ranks 8 --points 5",
          tiny="--shape tiny --ranks 2 --points 2 --engine autograd"),
    Stage(name="planner", why="the planner's total beside the allocator's peak", limit=60, script="plan_accuracy.py",
          real="--shape minilm deberta-v3-base llama-512", tiny="--shape tiny --batch 2 --length 16"),
    Stage(name="fit", why="seam, growth, resume and torch.compile in bfloat16", limit=70, script="gpu_fit.py",
          real="--shape llama-512 --steps 60 --resume --compile inductor",
          tiny="--shape tiny --steps 6 --batch 2 --length 16 --k 3 --methods weightlora+ --resume --compile eager"
               " --engine autograd"),
    Stage(name="smollm2", why="SmolLM2's own weights: lora, the rule's 21, a random 21", limit=80, script="gpu_fit.py",
          real="--shape smollm2-weights --steps 60 --k 21 --methods lora weightlora random --seeds 0 1 2",
          tiny="--shape tiny --steps 5 --batch 2 --length 16 --k 3 --methods random --engine autograd"),
)  # fmt: skip


def outcome(out: Path, stage: Stage) -> dict[str, Any]:
    """How a stage ended the last time; nothing where it never ran."""
    path = out / f"{stage.name}.stage.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def rehearsed(stage: Stage, out: Path) -> dict[str, Any]:
    """One stage in this process, so that the libraries are imported once for all."""
    began = time.monotonic()
    importlib.import_module(stage.script.removesuffix(".py")).main(stage.arguments(out, rehearse=True))
    found = {"stage": stage.name, "status": "done", "seconds": round(time.monotonic() - began, 1), "rehearsal": True}
    write(out / f"{stage.name}.stage.json", found)
    return found


def run(stage: Stage, out: Path, limit: float) -> dict[str, Any]:
    """One stage, and the file that says how it ended. A stage that takes too long is killed with all it has started."""
    command, began = [sys.executable, str(HERE / stage.script), *stage.arguments(out)], time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
        status = "done" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = "out of time"
    found = {
        "stage": stage.name, "status": status, "seconds": round(time.monotonic() - began, 1), "limit": round(limit, 1),
        "command": command[1:], "output": output[-4000:],
    }  # fmt: skip
    write(out / f"{stage.name}.stage.json", found)
    return found


def budget() -> str:
    """What a visit takes at most, stage by stage."""
    lines, total = [], 0
    for stage in STAGES:
        total += stage.limit
        lines.append(f"{stage.name:14} {stage.limit:4} s, {total:4} s together   {stage.why}")
    return "\n".join([*lines, f"at most {VISIT} s: what is left of {VISIT} s limits the last stages"])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", action="store_true", help="say what a visit takes, and stop")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], metavar="STAGE")
    parser.add_argument("--seconds", type=float, default=VISIT, help="of the whole visit (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu", help="folder of the JSON files")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    print(budget(), flush=True)
    if args.budget:
        return []
    args.out.mkdir(parents=True, exist_ok=True)
    stop, found = time.monotonic() + args.seconds, []
    for stage in STAGES:
        if args.only and stage.name not in args.only:
            continue
        left = stop - time.monotonic()
        if outcome(args.out, stage).get("status") == "done":
            print(f"{stage.name:14} was done before", flush=True)
        elif left < LEAST:
            print(f"{stage.name:14} no time left", flush=True)
        else:
            found.append(rehearsed(stage, args.out) if args.rehearse else run(stage, args.out, min(stage.limit, left)))
            print(f"{stage.name:14} {found[-1]['status']} in {found[-1]['seconds']} s", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(any(one["status"] != "done" for one in main()))
