"""The Triton engine without a GPU: its choice, its kernels in Triton's interpreter, and their compilation for CUDA."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from weightlora import ops
from weightlora.errors import ConfigError
from weightlora.ops import triton_path

ROOT = Path(__file__).resolve().parents[2]
BINARIES = ROOT / "benchmarks" / "results" / "gpu-binaries.json"
has_triton = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not has_triton, reason="NO TRITON: its kernels are not tested; pip install triton")


def run(*command: str, interpret: bool) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@needs_triton
@pytest.mark.slow
def test_kernels_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    more = ["--long"] if request.config.getoption("long") else []
    file = "tests/ops/triton_interpreted.py"
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *more, file, interpret=True)
    assert "passed" in out
    assert "skipped" not in out


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_the_binaries_of_a_step(target: str) -> None:
    """What a layer of PEFT's default kind (bfloat16 base, float32 adapters, dropout) launches, for a real device."""
    import triton

    from benchlib import binaries

    if not binaries.compiles_for(target):
        pytest.skip(f"NO COMPILER FOR {target}: this Triton comes without one")
    known = json.loads(BINARIES.read_text())
    # Variants of one kernel differ little; one of each is compiled here, all of them by benchmarks/gpu_binaries.py.
    step = {v.kernel: v for v in binaries.of_a_step("bfloat16", "float32", 16, drop=True)}
    assert step.keys() == triton_path.TILES.keys()
    for variant in step.values():
        found = binaries.read(binaries.build(variant, target), variant, target)
        assert found["spilled_bytes"] == 0, variant
        assert found["matrix_instructions"], variant
        assert found["shared_bytes"] <= 64 * 1024, variant  # AMD's limit; NVIDIA's is larger
        if target == "sm_90" and variant.kernel in ("_down", "_up"):
            assert "HGMMA" in found["matrix_instructions"], variant  # Hopper's own, of a whole warp group
        if known["triton"] == triton.__version__:
            assert {"target": target, **asdict(variant), **found} in known["rows"]


@needs_triton
def test_every_binary_was_read_and_none_spills() -> None:
    from benchlib import binaries

    known = json.loads(BINARIES.read_text())
    assert known["kernels_sha256"] == binaries.kernels_sha256(), "run python benchmarks/gpu_binaries.py"
    assert {row["target"] for row in known["rows"]} == set(binaries.TARGETS)
    assert len(known["rows"]) == len(binaries.TARGETS) * len(list(binaries.every_variant()))
    assert all(row["matrix_instructions"] for row in known["rows"])
    assert known["spilling"] == 0


@needs_triton
@pytest.mark.parametrize("kernel", triton_path.TILES)
def test_what_changes_from_step_to_step_compiles_nothing(kernel: str) -> None:
    """Seeds, numbers of tokens and how they are split: a new value is an argument, not a new kernel."""
    varying = {"tokens", "rank", "part", "seed", "threshold", "groups"}
    for parameter in getattr(triton_path, kernel).params:
        assert parameter.do_not_specialize == (parameter.name in varying), parameter.name


@pytest.mark.skipif(torch.cuda.is_available() and has_triton, reason="the Triton engine runs here")
def test_an_explicit_choice_fails_with_the_reason() -> None:
    reason = "torch sees no CUDA device" if has_triton else "the package triton is not installed"
    with pytest.raises(ConfigError, match=f"engine 'triton' cannot run: {reason}; use engine='autograd'"):
        ops.engine("triton")


@pytest.mark.skipif(torch.cuda.is_available() and has_triton, reason="the Triton engine runs here")
def test_the_automatic_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    ops._automatic.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="weightlora"):
        assert ops.engine("auto") is ops.ENGINES["autograd"]
        assert ops.engine("auto") is ops.ENGINES["autograd"]
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == (logging.INFO if torch.cuda.is_available() else logging.DEBUG)
    assert caplog.records[0].getMessage().startswith("adapter path: autograd (")
