"""A sample of ``benchmarks/fuzz.py``: broken input is refused in one line, or works, and writes nowhere else."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz.py"


@pytest.mark.parametrize("seed", [1, 2])
def test_broken_input_is_refused_clearly(seed: int, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    result = fuzz.Fuzz(seed, tmp_path).run(160)
    assert result["findings"] == []
    assert sum(result["inputs"].values()) == 160
    assert {name.partition(": ")[2] for name in result["outcomes"]} >= {"accepted", "refused", "exit 2"}
