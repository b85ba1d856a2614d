"""Two processes never work in one run directory; a dead one holds nothing."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.runs.commands import TINY, read, spec, tree, weightlora

from weightlora.errors import BusyError
from weightlora.runs.lock import alone, lock_file, refuse_busy
from weightlora.study.jobs import attempt

HOLD = """
import sys
from pathlib import Path
from weightlora.runs.lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(timeout=30)
        process.stdout.close()


@pytest.fixture
def flags(small_data: Path) -> list[str]:
    return [
        "--task",
        "sst2",
        "--data-dir",
        str(small_data),
        *TINY,
        "--k",
        "3",
        "--max-steps",
        "4",
        "--select-after",
        "2",
    ]


def test_every_command_is_refused_and_touches_nothing(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert weightlora("train", *flags, "--out", run) == 0
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_bytes((run / "config.json").read_bytes())
    commands = {
        "train": (run, ["train", *flags, "--out", run, "--overwrite"]),
        "resume": (unfinished, ["resume", unfinished]),
        "export": (run, ["export", run]),
        "select": (tmp_path / "chosen", ["select", *flags, "--out", tmp_path / "chosen"]),
        "probe": (tmp_path / "probe", ["probe", *flags, "--seeds", "0", "--out", tmp_path / "probe"]),
    }
    capsys.readouterr()
    for name, (folder, words) in commands.items():
        with held(folder):
            before = tree(tmp_path)
            assert weightlora(*words) == 2, name
            assert tree(tmp_path) == before, name
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines == [
            f"weightlora {name}: error: another process is at work in {folder}; wait for it, stop it, or choose"
            " another folder"
        ]


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    with held(tmp_path / "run") as process:
        with pytest.raises(BusyError), alone(tmp_path / "run"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        with alone(tmp_path / "run"):
            pass


def test_a_cell_of_a_sweep_enters_the_run_that_it_holds(flags: list[str], small_data: Path, tmp_path: Path) -> None:

    config = spec(
        task="sst2",
        data_dir=str(small_data),
        model="bert-tiny-shape",
        max_length=24,
        settings={"k": 3, "select_after": 2},
        training={"max_steps": 3, "per_device_train_batch_size": 4},
    )
    record = attempt(config, tmp_path / "cell", quiet=True)
    assert record.status == "ok"
    assert read(tmp_path / "cell" / "record.json")["status"] == "ok"
    assert lock_file(tmp_path / "cell").exists()


def test_one_thread_may_hold_twice_and_looking_leaves_no_trace(tmp_path: Path) -> None:
    refuse_busy(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    with alone(tmp_path / "a"), alone(tmp_path / "a"):
        refuse_busy(tmp_path / "a")
