"""A sweep on a real Ray of two nodes, of which one is killed midway: nothing is lost, nothing is run twice."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from tests.runs.commands import labelled, read, spec, weightlora
from tests.runs.killer import Killer

from weightlora.study.jobs import attempt

pytest.importorskip("ray", reason="NO RAY: pip install weightlora[ray]")

STEPS, SAVE = 40, 10
RAYLET = "raylet"  # the file for the process id of the node that is to die


class NodeKiller(threading.Thread):
    """Kills the second node in the middle of a run that has a checkpoint, once another run is finished."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.killed: Path | None = None
        self.checkpoints: dict[str, int] = {}  # of the run in its middle, with the times they were written
        self.finished: dict[str, int] = {}  # files of finished runs, likewise

    def run(self) -> None:
        deadline = time.monotonic() + 260
        while self.killed is None and time.monotonic() < deadline:
            time.sleep(0.02)
            done, live = [], []
            for record in self.folder.glob("out/runs/*/record.json"):
                (done if read(record)["status"] == "ok" else live).append(record.parent)
            for folder in live:
                states = sorted(folder.glob("checkpoints/checkpoint-*/trainer_state.json"))
                if done and states and self.kill(folder):
                    self.killed = folder
                    self.checkpoints = {str(path): path.stat().st_mtime_ns for path in states[:-1] or states}
                    self.finished = times(done)
                    return

    def kill(self, folder: Path) -> bool:
        """End the second node, its raylet and its worker, if that worker holds the run's lock."""
        lock = str(folder.parent / f".{folder.name}.lock")
        raylet = (self.folder / RAYLET).read_text(encoding="utf-8")
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if any(os.readlink(link) == lock for link in (process / "fd").iterdir()):
                    if f"PPid:\t{raylet}\n" not in (process / "status").read_text(encoding="utf-8"):
                        return False
                    for each in (raylet, process.name):
                        os.kill(int(each), signal.SIGKILL)
                    return True
            except OSError:  # not ours, or gone
                continue
        return False


def times(folders: list[Path]) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="NO /proc: a worker cannot be found by its lock")
def test_a_node_is_killed_and_nothing_is_lost_or_run_twice(killer: Killer, tmp_path: Path) -> None:
    rows = str(labelled(tmp_path / "rows.jsonl"))
    shape = ["--task", "files", "--train-file", rows, "--label-column", "label", "--max-length", "24"]
    shape += ["--model", "bert-tiny-shape", "--per-device-train-batch-size", "8", "--ray", "auto"]
    words = ["sweep", *shape, "--methods", "top,lora", "--seeds", "0,1", "--max-steps", str(STEPS)]
    words += ["--save-steps", str(SAVE), "--save-total-limit", "9"]
    words += ["--out", "out"]  # relative: workers must not take it for a path of theirs
    comparison = ["compare", *shape, "--methods", "top", "--seeds", "0", "--max-steps", "4", "--out", "compared"]
    death = NodeKiller(tmp_path)
    death.start()
    # The second time all is there already.
    commands, err = json.dumps([words, words, comparison]), tmp_path / "err"
    program = killer.start([commands, str(tmp_path / RAYLET)], err, program="tests.runs.ray_run", folder=tmp_path)
    code = killer.finish(program)
    said = err.read_text(encoding="utf-8")
    assert code == 0, said
    death.join(timeout=5)
    assert death.killed is not None, "the runs were over before one could be killed"

    records = [read(path) for path in sorted((tmp_path / "out" / "runs").glob("*/record.json"))]
    assert sorted((record["method"], record["seed"], record["status"]) for record in records) == [
        (method, seed, "ok") for method in ("lora", "top") for seed in (0, 1)
    ]
    assert said.count("[4/4]") == 1
    assert said.count("4 of 4 runs are there already") == 1
    # What was done when the node died was not touched again: finished runs, and the killed run's checkpoints.
    assert death.finished
    assert {path: os.stat(path).st_mtime_ns for path in death.finished} == death.finished
    assert {path: os.stat(path).st_mtime_ns for path in death.checkpoints} == death.checkpoints

    compared = read(tmp_path / "compared" / "table.json")["rows"]
    assert [(row["method"], row["seeds"], row["failed"]) for row in compared] == [("top", [0], 0)]

    # The same run without Ray and without a death ends in the same adapter.
    values = json.loads((death.killed / "config.json").read_text(encoding="utf-8"))
    values.pop("schema_version")
    alone = attempt(spec(**values), tmp_path / "alone", quiet=True)
    assert alone.metrics == read(death.killed / "record.json")["metrics"]
    adapters = [folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "alone", death.killed)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_cluster_that_is_gone_gets_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray left its address behind when it died, and would wait for it for minutes."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        gone = f"127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        # The cluster of the test above may live at this moment.
        monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{gone}\n")
        _refused(tmp_path, capsys, "auto", gone)
        _refused(tmp_path, capsys, gone, gone)


def _refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str, gone: str) -> None:
    words = ("sweep", "--model", "bert-tiny-shape", "--max-steps", "2", "--out", tmp_path / "out")
    assert weightlora(*words, "--ray", address) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"weightlora sweep: error: no Ray cluster at {address!r} (nobody answers at {gone}: ")
    assert said.endswith("start one with `ray start --head`, or use --ray local")
