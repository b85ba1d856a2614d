"""Commands in forked processes that die when a test wants them to; see ``killed_run.py``."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

from tests.forks import Forks
from tests.runs.commands import read

STATE = "trainer_state.json"
SAVED = re.compile(rf"open checkpoints/checkpoint-(\d+)/{STATE}")
Kill = tuple[str, int, float]  # the label's start, which of those events, seconds to wait


class Killer(Forks):
    """Commands that die at a chosen event, or that a test watches; see ``killed_run.py``."""

    def __init__(self) -> None:
        super().__init__(Path(__file__).with_name("killed_run.py"))

    def life(self, out: Path, flags: list[str], kills: list[Kill]) -> list[dict[str, Any]]:
        """Train (and die, and resume) to the end; every process but the last was killed, and that one went well."""
        answer = self.ask({"out": str(out), "train": ["train", *flags, "--out", str(out)], "kills": kills})
        tries: list[dict[str, Any]] = answer["tries"]
        assert tries[-1]["code"] == 0, f"{out.name}: {answer['output'][-2000:]}"
        for number, (kill, one) in enumerate(zip(kills, tries[:-1], strict=False)):
            wanted = signal.SIGALRM if kill[2] else signal.SIGKILL
            assert one["signal"] == wanted, (out.name, number, one["signal"], answer["output"][-2000:])
        return tries

    def start(
        self, words: list[str], stderr: str | Path, stdout: str | Path = os.devnull, *,
        program: str = "weightlora.cli.main", folder: Path | None = None,
    ) -> int:  # fmt: skip
        """The number of a process that has begun to do a command, with those terminals, pipes or files to write to."""
        job = {"words": words, "stderr": str(stderr), "stdout": str(stdout), "program": program}
        pid: int = self.ask({**job, "folder": str(folder or Path.cwd())})["pid"]
        return pid

    def call(self, function: str) -> dict[str, Any]:
        """What "module:function" of the tests says there, and how that process hashes "text"."""
        found: dict[str, Any] = self.ask({"call": function})
        return found

    def finish(self, pid: int) -> int:
        """The exit code of such a process."""
        code: int = self.ask({"pid": pid})["code"]
        return code


def outcome(run: Path) -> dict[str, Any]:
    """What a run came to: every byte of the weights, the selection, and the numbers of the record."""
    record = read(run / "record.json")
    phases = [{key: phase[key] for key in phase if key != "seconds"} for phase in record["phases"]]
    weights = run / "adapter" / "adapter_model.safetensors"
    return {
        "weights": (weights if weights.is_file() else run / "model" / "model.safetensors").read_bytes(),
        "selection": read(run / "selection.json") if (run / "selection.json").is_file() else None,
        "status": record["status"],
        "kept": record["kept"],
        "metrics": record["metrics"],
        "phases": phases,
        "trainable_params": record["trainable_params"],
    }


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [key for key in a if a[key] != b[key]]


def saved_before(events: list[str], number: int) -> int:
    """The step of the latest checkpoint whose last file was written before that event (they count from 1)."""
    return max((int(found[1]) for label in events[: number - 1] if (found := SAVED.match(label))), default=0)
