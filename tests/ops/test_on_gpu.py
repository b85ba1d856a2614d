"""The visit to a GPU, rehearsed on the CPU: every stage runs, says how it ended, and is not run twice.

The rehearsal itself is called in ``triton_interpreted.py``.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import carry
import on_gpu

pytestmark = pytest.mark.slow


def rehearsal(tmp_path: Path, said: Callable[[], str]) -> None:
    """All stages in this process, which ``triton_interpreted.py`` runs: the kernels are interpreted there."""
    on_gpu.main(["--rehearse", "--out", str(tmp_path)])
    assert f"at most {on_gpu.VISIT} s" in said()
    for stage in on_gpu.STAGES:
        assert on_gpu.outcome(tmp_path, stage)["status"] == "done"
        assert json.loads((tmp_path / f"{stage.name}.json").read_text())["provenance"]["command"].startswith("python")
    fit = json.loads((tmp_path / "fit.json").read_text())
    assert fit["resumed"]["largest_difference"] == 0.0
    assert [phase["name"] for phase in fit["compiled"]["phases"]] == ["warmup", "final"]
    check = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert {row["engine"] for row in check} == {"autograd", *(["triton"] if importlib.util.find_spec("triton") else [])}
    assert all(row["good"] for row in check)
    # A second visit has nothing left to do.
    assert on_gpu.main(["--out", str(tmp_path)]) == []


def test_a_stage_that_takes_too_long_is_killed_and_would_be_tried_again(tmp_path: Path) -> None:
    stage = on_gpu.STAGES[0]
    found = on_gpu.run(stage, tmp_path, 0.1)
    assert found["status"] == "out of time"
    assert on_gpu.outcome(tmp_path, stage) == found
    assert not (tmp_path / f"{stage.name}.json").exists()


def test_the_limits_of_the_stages_fit_into_a_visit() -> None:
    assert sum(stage.limit for stage in on_gpu.STAGES) <= on_gpu.VISIT


def test_what_travels_in_pieces_arrives_whole(tmp_path: Path) -> None:
    files = []
    for name, size in (("a.whl", 10), ("b.gguf", 57), ("empty", 0)):
        files.append(tmp_path / name)
        files[-1].write_bytes(bytes(range(size)))
    out = tmp_path / "carry"
    carry.split(files, out, piece=25)
    pieces = sorted(folder for folder in out.iterdir())
    assert len(pieces) == 3
    for piece in pieces:
        assert sum(f.stat().st_size for f in piece.iterdir() if f.name != "parts.json") <= 25
    joined = carry.join(out, tmp_path / "joined")
    assert [file.read_bytes() for file in joined] == [file.read_bytes() for file in files]
    damaged = next(pieces[1].glob("b.gguf.*"))
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    with pytest.raises(SystemExit, match=r"b\.gguf is damaged"):
        carry.join(out, tmp_path / "joined")
    damaged.unlink()
    with pytest.raises(SystemExit, match=r"2/b\.gguf\.\d has not arrived: carry .*/2 too"):
        carry.join(out, tmp_path / "joined")
