"""The model of a step on a device that is not there: what it counts, what limits a kernel, whose file it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapter_path import Bench, count, parse, shape_of
from benchlib.roofline import H200, Launch, counted

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
MEMORY = Launch(name="copy", bytes=4.8e9, programs=None)


def test_a_step_is_counted_without_computing_it() -> None:
    args = parse(["--shape", "tiny", "--engine", "autograd"])
    bench = Bench(shape_of(args), args)
    for row in ("bare", "stock"):
        with bench.rows()[row]():
            launches = counted(bench.model, bench.loss)
        # The CPU's own attention is not counted by torch.
        plain = sum(one.flops for one in launches if "attention" not in one.name)
        assert plain == count(bench, [row])[row].flops
        assert all(one.bytes > 0 for one in launches)


def test_what_limits_a_kernel() -> None:
    assert MEMORY.limit(H200) == "memory"
    assert MEMORY.seconds(H200) == pytest.approx(1e-3, rel=0.01)
    assert replace(MEMORY, flops=790e12, dtype=torch.bfloat16).seconds(H200) == pytest.approx(1.0, rel=0.01)
    assert replace(MEMORY, instructions=H200.issue).limit(H200) == "instructions"
    # 64 programs of 16 KiB on their way cannot ask for 4.8 TB/s; four for each of 132 processors can.
    few = replace(MEMORY, programs=64, resident=4, flight=16 * 1024)
    assert few.filled(H200) == pytest.approx(64 / 132)
    assert few.asked(H200) < 0.4
    assert replace(few, programs=4 * 132).asked(H200) == 1.0
    # A last wave that is nearly empty takes as long as a full one.
    assert replace(few, programs=4 * 132 + 1).filled(H200) == pytest.approx(0.5, abs=0.01)


def test_the_results_are_of_these_kernels() -> None:
    model, binaries = (json.loads((RESULTS / f"gpu-{name}.json").read_text()) for name in ("model", "binaries"))
    assert model["kernels_sha256"] == binaries["kernels_sha256"], "run python benchmarks/gpu_model.py"
    for case in model["cases"]:
        rows = case["rows"]
        assert 1.0 < rows["ours"]["times_bare"] < rows["stock"]["times_bare"]
        assert rows["ours"]["flops"] >= rows["bare"]["flops"]


def test_the_page_says_what_the_files_hold() -> None:
    page = (RESULTS.parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")
    shown = 0
    for case in json.loads((RESULTS / "gpu-model.json").read_text())["cases"]:
        ours = case["rows"]["ours"]
        if case["shape"] == "llama-3-8b" or case["dropout"]:
            assert f"| {ours['times_bare']:.3f} | {ours['times_faster_than_stock']:.2f} |" in page
            shown += 1
    assert shown == 4
    step = {
        row["kernel"]: row
        for row in json.loads((RESULTS / "gpu-binaries.json").read_text())["rows"]
        if (row["target"], row["x"], row["adapter"], row["block"]) == ("sm_90", "bfloat16", "float32", 16)
        and row["drop"] == (row["kernel"] in ("_down", "_back"))
        and row["rows"] == (row["kernel"] != "_up")
    }
    for kernel, row in step.items():
        said = next(line for line in page.splitlines() if line.startswith(f"| `{kernel}` |")).split("|")
        assert said[4].strip() == str(row["registers"])
        assert said[5].strip() == f"{row['shared_bytes'] // 1024} KiB"
        assert said[6].strip() == f"{row['instructions_per_entry']:.1f}"
