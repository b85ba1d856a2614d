"""Two processes with half a batch each are one process with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.builders import max_difference
from tests.training.parallel_run import METHODS, run

from weightlora.graft import Selection

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", list(METHODS))
def test_two_processes_decide_and_train_as_one(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tests" / "training" / "parallel_run.py"), name, str(tmp_path / "two"), "2"]
    (tmp_path / "two").mkdir()
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path / "one").mkdir()
    run(name, tmp_path / "one", 4)

    folders = [(tmp_path / "one", 0), (tmp_path / "two", 0), (tmp_path / "two", 1)]
    assert [json.loads((f / f"seen-{r}.json").read_text()) for f, r in folders] == [[1, 12], [2, 12], [2, 12]]
    selections = [Selection.load(folder / f"selection-{rank}.json") for folder, rank in folders]
    assert selections[1] == selections[2]
    assert selections[1].names == selections[0].names
    omegas = [[c.omega for c in selection.choices] for selection in selections]
    # The mean over a batch is a mean of means; omega is float32, learns at rate 5 and resolves 1e-7.
    assert omegas[1] == pytest.approx(omegas[0], abs=1e-5)
    states = [torch.load(folder / f"adapter-{rank}.pt", weights_only=True) for folder, rank in folders]
    assert max_difference(states[1], states[2]) == 0.0
    assert max_difference(states[0], states[1]) < 1e-4
