"""A full disk, or a folder that cannot be written, is one clear line; with space again the run goes on."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.runs.commands import TINY, read, weightlora


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def flags(small_data: Path) -> list[str]:
    rest = ["--k", "3", "--max-steps", "6", "--warmup-steps", "3", "--save-steps", "2"]
    return ["--task", "sst2", "--data-dir", str(small_data), *TINY, *rest]


def test_no_space_for_a_checkpoint(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert weightlora("train", *flags, "--out", tmp_path / "whole") == 0
    expected = (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()
    largest = max(file.stat().st_size for file in (tmp_path / "whole" / "checkpoints").rglob("*.pt"))
    run = tmp_path / "run"
    capsys.readouterr()
    with no_file_beyond(largest // 2):
        assert weightlora("train", *flags, "--out", run) == 1
    told = [line for line in capsys.readouterr().err.strip().splitlines() if ": step " not in line]  # not progress
    assert len(told) == 1
    assert f"no space to write into {run}; free some, then `weightlora resume {run}` goes on" in told[0]
    assert read(run / "record.json")["status"] == "failed"
    assert not (run / "adapter").exists()
    assert weightlora("resume", run) == 0
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == expected


def test_no_space_for_anything(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with no_file_beyond(10):
        assert weightlora("train", *flags, "--out", tmp_path / "run") == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "File too large; free some space" in error[0]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".run.lock"]
    assert weightlora("train", *flags, "--out", tmp_path / "run") == 0


def test_a_folder_that_cannot_be_made(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("no folder")
    for out in (tmp_path / "file" / "run", Path("/proc/weightlora-run")):
        assert weightlora("train", *flags, "--out", out) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert "give a path that exists, and that you may read or write" in error[0]
    assert (tmp_path / "file").read_text() == "no folder"
