"""The command line called from tests, and small copies of the benchmark data that it can read fast."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from weightlora.cli.main import main
from weightlora.runs.spec import RunSpec

TRAIN_ROWS, EVAL_ROWS = 120, 40
TASKS = ("sst2", "mrpc", "stsb")
TINY = ("--model", "bert-tiny-shape", "--max-length", "24", "--per-device-train-batch-size", "8")


def weightlora(*words: object) -> int:
    """Run one command in this process; returns its exit code."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


def spec(**settings: Any) -> RunSpec:
    """The run of some settings, under the names that flags have."""
    return RunSpec.of(settings)


def run_folders(folder: Path, kind: str = "runs", **values: Any) -> list[Path]:
    """The folders of a study's runs (or "tune") whose configurations have these values, by seed and learning rate."""
    found = [(read(path), path.parent) for path in (folder / kind).glob("*/config.json")]
    kept = [(config, path) for config, path in found if values.items() <= config.items()]
    order = sorted(kept, key=lambda one: (one[0]["seed"], one[0]["training"].get("learning_rate", 0)))
    return [path for _, path in order]


def copy_data(source: Path, folder: Path, tasks: Sequence[str] = TASKS) -> Path:
    """The first rows of some tasks: real text, small files."""
    for task in tasks:
        (folder / task).mkdir(parents=True)
        for split, count in (("train", TRAIN_ROWS), ("validation", EVAL_ROWS)):
            with (source / task / f"{split}.jsonl").open(encoding="utf-8") as lines:
                write_rows(folder / task / f"{split}.jsonl", [json.loads(line) for line in islice(lines, count)])
    return folder


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(path: Path, count: int = 240) -> Path:
    """A file of a task that processes read in no time: short texts, two classes."""
    words = ("good", "bad")
    return write_rows(path, [{"text": f"number {i} is {words[i % 2]}", "label": words[i % 2]} for i in range(count)])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """One JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the bytes of the files: equal trees mean that nothing was written.

    The lock files of what exists are left out: they are empty and stay, since removing one would let in two.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        held = path.with_name(path.name[1:].removesuffix(".lock"))
        if not (path.match(".*.lock") and held.exists() and path.read_bytes() == b""):
            found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found
