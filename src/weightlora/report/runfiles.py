"""What lies in a run directory, as far as a report needs it: the record, the log, the adapter's configuration."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from weightlora.errors import CheckpointError, ConfigError, WeightLoRAError
from weightlora.files import read_object
from weightlora.runs.record import AdapterScore, Kept, PhaseResult, Record

RECORD = "record.json"
MANIFEST = "weightlora.json"
CHECKPOINTS = "checkpoints"
TRAINER_STATE = "trainer_state.json"
TUNING = "tune"  # where `compare` puts the trials of learning rates; they are no results
ERROR_LINES = 40

Log = tuple[dict[str, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFiles:
    """One run as its files tell it. Only ``record`` is certain; a run that died early has little else.

    Args:
        path: where it lies, as the user named it.
        record: its record; where the run did not finish, completed by its latest checkpoint.
        log_file: the file with the trainer's log, if there is one.
        checkpoint: the step of the checkpoint that the log and the completion came from; None: the run's end.
        adapter_config: PEFT's own file for the adapter, if it was written.
        error: the end of the traceback of a failed run.
    """

    path: Path
    record: Record
    log_file: Path | None = None
    checkpoint: int | None = None
    adapter_config: dict[str, object] | None = None
    error: str = ""

    def read_log(self) -> Log:
        """The trainer's entries in order of time, numbers only. Read anew: fifty logs in memory would be too many."""
        return () if self.log_file is None else _numbers(_entries(_object(self.log_file)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The runs in the order of their names, and a line for each thing that was left out."""

    runs: tuple[RunFiles, ...]
    left_out: tuple[str, ...]


def find_runs(paths: Sequence[Path]) -> Found:
    """Read every run that ``paths`` name: run directories, record files, or folders that are searched for runs.

    Raises:
        ConfigError: a path that leads to no run at all, or not one record that can be read.
    """
    runs: dict[Path, RunFiles] = {}
    left_out = []
    for path in paths:
        records, trials = _records(path)
        if trials:
            left_out.append(f"{path / TUNING}: {trials} trials of learning rates; name the folder itself to see them")
        for record in records:
            try:
                runs.setdefault(record.resolve(), read_run(record))
            except CheckpointError as error:
                left_out.append(str(error))
    if not runs:
        raise ConfigError(
            left_out[0]
            if left_out
            else "nothing to report on; name one or more run directories, record files or folders of runs"
        )
    return Found(runs=tuple(runs.values()), left_out=tuple(dict.fromkeys(left_out)))


def _records(path: Path) -> tuple[list[Path], int]:
    """The record files that a path stands for, and how many trials of `compare --tune` were passed over."""
    if path.is_file():
        return [path], 0
    if (path / RECORD).is_file():
        return [path / RECORD], 0
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist; give a run directory, a {RECORD}, or a folder of runs")
    inside = {found: found.relative_to(path).parts for found in path.rglob(RECORD)}
    whole = [found for found, parts in inside.items() if not any(part.startswith(".") for part in parts)]
    results = sorted((found for found in whole if inside[found][0] != TUNING), key=_natural)
    if not results:
        raise ConfigError(f"{path} holds no run: there is no {RECORD} in it or below; give the folder of --out")
    return results, len(whole) - len(results)


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts seed-2 before seed-10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", str(path))]


def read_run(path: Path) -> RunFiles:
    """The run whose record is the file ``path``.

    Raises:
        CheckpointError: the record cannot be read. Whatever else is missing or damaged is left out.
    """
    record = Record.read(path)
    folder = path.parent if path.name == RECORD else None
    if folder is None:
        return RunFiles(path=path, record=record)
    log_file: Path | None = folder / MANIFEST
    checkpoint = None
    if record.status != "ok" or not _entries(_object(folder / MANIFEST)):
        state, step = _latest_checkpoint(folder / CHECKPOINTS)
        log_file = state / TRAINER_STATE if state else None
        if state and record.status != "ok":
            record, checkpoint = _completed(record, _object(state / MANIFEST)), step
    text = _text(folder / "error.txt") if record.status == "failed" else ""
    return RunFiles(
        path=folder,
        record=record,
        log_file=log_file,
        checkpoint=checkpoint,
        adapter_config=_object(folder / "adapter" / "adapter_config.json") or None,
        error="\n".join(text.strip().splitlines()[-ERROR_LINES:]),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _object(path: Path) -> dict[str, object]:
    """A JSON object, or an empty one where there is none."""
    return read_object(path) or {}


def _number(value: object) -> bool:
    # Compared, not converted: a whole number from a file may be too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _entries(data: dict[str, object]) -> object:
    """The log in a run's manifest, or in a trainer's state."""
    inside = data.get("data")
    return data.get("log_history") if not isinstance(inside, dict) else inside.get("log")


def _numbers(log: object) -> Log:
    """The entries of a trainer's log that say at which step they were made, with their finite numbers."""
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    kept = [{str(key): float(value) for key, value in entry.items() if _number(value)} for entry in entries]
    return tuple(sorted((entry for entry in kept if "step" in entry), key=lambda entry: entry["step"]))


def _latest_checkpoint(folder: Path) -> tuple[Path | None, int | None]:
    """The checkpoint with the highest step whose trainer state can be read, and that step."""
    steps = {state.parent: _object(state).get("global_step") for state in folder.glob(f"*/{TRAINER_STATE}")}
    known = {path: step for path, step in steps.items() if isinstance(step, int)}
    if not known:
        return None, None
    latest = max(known, key=lambda path: (known[path], path.name))  # seam-5 comes after checkpoint-5
    return latest, known[latest]


def _completed(record: Record, manifest: dict[str, Any]) -> Record:
    """A record that was not finished, with the phases and the selection that its latest checkpoint knows."""
    try:
        phases = tuple(PhaseResult(**phase) for phase in manifest["data"].get("phases", ()))
        selection = manifest.get("selection")
        whole = dataclasses.replace(record, phases=record.phases or phases)
        if not record.adapters and selection is not None:
            choices = selection["choices"]
            whole = dataclasses.replace(
                whole,
                seam_step=selection["step"],
                why=selection["why"],
                adapters=tuple(_adapter(choice) for choice in choices),
                kept=tuple(Kept(name=c["name"], omega=c["omega"], rank=c["rank"]) for c in choices if c["kept"]),
            )
        return Record.from_json(whole.to_json())  # which refuses a value of another type than the schema's
    except (WeightLoRAError, KeyError, TypeError, ValueError, AttributeError):
        return record  # damaged or of another release: what the record says has to do


def _adapter(choice: dict[str, Any]) -> AdapterScore:
    name = str(choice["name"])
    return AdapterScore(
        name=name,
        block=next(_blocks(name), None),
        kind=name.rpartition(".")[2],
        omega=choice["omega"],
        score=choice["score"],
        kept=choice["kept"],
    )


def _blocks(name: str) -> Iterator[int]:
    return (int(part) for part in name.split(".") if part.isdecimal())
