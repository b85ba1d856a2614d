"""The Triton engine without a GPU: its choice, its kernels in Triton's interpreter, and their compilation for CUDA."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weightlora import ops
from weightlora.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
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
def test_kernels_in_the_interpreter() -> None:
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/triton_interpreted.py", interpret=True)
    assert "passed" in out
    assert "skipped" not in out


COMPILE = """
import sys, warnings
warnings.simplefilter("ignore")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from weightlora.ops import triton_path as path

wide, narrow = sys.argv[1:3]
pointers = {"x": wide, "out": wide, "A": narrow, "h": narrow, "B": narrow, "u": narrow}
scalars = {"seed": "i64", "p": "fp32", "scale": "fp32"}
for kernel in (path._down, path._up, path._outer):
    constants = {"DROP": True, "PRECISION": sys.argv[3], "BT": path.TOKENS, "BD": path.WIDTH, "BR": 16}
    constants |= {"ADD": True} if "ADD" in kernel.arg_names else {}
    types = {n: "constexpr" if n in constants else pointers.get(n) or scalars.get(n, "i32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    built = compile(ASTSource(fn=kernel, signature=types, constexprs=places), target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__, len(built.asm["cubin"]) > 0)
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("x", "adapter", "precision"), [("*bf16", "*fp32", "tf32x3"), ("*bf16", "*bf16", "tf32")])
def test_kernels_compile_for_cuda(x: str, adapter: str, precision: str) -> None:
    out = run("-c", COMPILE, x, adapter, precision, interpret=False)
    assert out.split() == ["_down", "True", "_up", "True", "_outer", "True"]


@pytest.mark.skipif(torch.cuda.is_available() and has_triton, reason="the Triton engine runs here")
def test_an_explicit_choice_fails_with_the_reason() -> None:
    reason = "torch sees no CUDA device" if has_triton else "the package triton is not installed"
    with pytest.raises(ConfigError, match=f"engine 'triton' cannot run: {reason}; use engine='autograd'"):
        ops.engine("triton")


@pytest.mark.skipif(torch.cuda.is_available() and has_triton, reason="the Triton engine runs here")
def test_the_automatic_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    ops._automatic.cache_clear()
    with caplog.at_level(logging.INFO, logger="weightlora"):
        assert ops.engine("auto") is ops.ENGINES["autograd"]
        assert ops.engine("auto") is ops.ENGINES["autograd"]
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("adapter path: autograd (")
