"""A full disk, or a folder that cannot be written, is one clear line; with space again the run goes on."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.runs.commands import TINY, read, tree, weightlora

from weightlora.training.identity import IN_USE


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def flags(small_data: Path) -> list[str]:
    rest = ["--k", "3", "--max-steps", "6", "--select-after", "3", "--save-steps", "2"]
    return ["--task", "sst2", "--data-dir", str(small_data), *TINY, *rest]


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that always had space. Not to be changed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert weightlora("train", *flags, "--out", run) == 0
    return run


def adapter_of(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_no_space_for_a_checkpoint(
    flags: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    largest = max(file.stat().st_size for file in (whole / "checkpoints").rglob("*.pt"))
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
    assert adapter_of(run) == adapter_of(whole)


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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 4 MiB on it; a loud skip where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder))
    if done.returncode:
        pytest.skip(f"NO MOUNTING HERE ({done.stderr.strip()}): a really full disk is not tested")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def mount(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *words], capture_output=True, text=True, check=False)


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines of error that are not progress."""
    return [line for line in capsys.readouterr().err.strip().splitlines() if ": step " not in line]


@pytest.mark.parametrize("free", [0, 40, 400, 1200], ids=lambda k: f"{k}KiB")
def test_a_disk_that_is_really_full(
    free: int, disk: Path, flags: list[str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever did not fit, one line says so; with space the run ends with the adapter of one that always had it."""
    (disk / "others").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - free * 1024))
    capsys.readouterr()
    assert weightlora("train", *flags, "--out", disk / "run") == 1
    (line,) = told(capsys)
    assert "free some" in line
    assert not (disk / "run" / "adapter").exists()
    assert not [path for path in disk.rglob(".*") if path.suffix != ".lock" and path.name != IN_USE]
    (disk / "others").unlink()
    again = (
        ["resume", disk / "run"]
        if (disk / "run" / "config.json").is_file()
        else ["train", *flags, "--out", disk / "run"]
    )
    assert weightlora(*again) == 0
    assert adapter_of(disk / "run") == adapter_of(whole)


def test_a_disk_that_may_only_be_read(disk: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert weightlora("train", *flags, "--out", disk / "run") == 0
    before = tree(disk)
    assert mount("-o", "remount,ro", str(disk)).returncode == 0
    for words in (
        ["train", *flags, "--out", disk / "new"],
        ["export", disk / "run", "--profile", "portable"],
        ["compare", "--methods", "lora", *flags, "--out", disk / "many"],
        ["report", disk / "run", "--out", disk / "page.html"],
    ):
        capsys.readouterr()
        assert weightlora(*words) in (1, 2), words
        (line,) = told(capsys)
        assert "Read-only file system" in line, words
    assert tree(disk) == before
    # What only reads goes on working.
    assert weightlora("report", disk / "run", "--out", disk.parent / "page.html") == 0


def test_a_clock_that_jumps(flags: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By years, both ways, at every look; and files whose dates say the opposite of their order."""
    shutil.copytree(whole, tmp_path / "half")
    for name in ("adapter", "checkpoints/checkpoint-6"):
        shutil.rmtree(tmp_path / "half" / name)
    for path in ("record.json", "weightlora.json", "selection.json"):
        (tmp_path / "half" / path).unlink()
    for age, folder in enumerate(sorted((tmp_path / "half" / "checkpoints").glob("*-*"), reverse=True)):
        for path in (folder, *folder.iterdir()):
            os.utime(path, (1e9 + 1e8 * age, 1e9 + 1e8 * age))
    draw, now = random.Random(0), time.time
    looks = []

    def jumping() -> float:
        looks.append(draw.uniform(-1e8, 1e8))
        return now() + looks[-1]

    monkeypatch.setattr(time, "time", jumping)
    assert weightlora("train", *flags, "--out", tmp_path / "run") == 0
    assert weightlora("resume", tmp_path / "half") == 0
    assert len(looks) > 3
    for run in ("run", "half"):
        assert adapter_of(tmp_path / run) == adapter_of(whole)
    seconds = [phase["seconds"] for phase in read(tmp_path / "run" / "record.json")["phases"]]
    assert all(0 < number < 300 for number in seconds)
