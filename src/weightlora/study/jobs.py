"""Many runs, here one after the other or spread over a Ray cluster: none is lost, none is run twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from weightlora.errors import ConfigError, WeightLoRAError
from weightlora.files import write_text
from weightlora.runs.lock import alone
from weightlora.runs.record import Record
from weightlora.runs.run import ERROR, RECORD, finished, refused, resume, train
from weightlora.runs.spec import CONFIG, RunSpec
from weightlora.study.cluster import Cluster, spread
from weightlora.tasks import read_task, tell_once

log = logging.getLogger("weightlora")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run that is to be there in the end: its description, its directory, and what to call it in a line."""

    spec: RunSpec
    folder: Path
    title: str


def run_name(spec: RunSpec) -> str:
    """A directory name that follows from everything that defines a run, and from nothing else.

    Task, method and seed for people, then a hash of all values that are not the default: a field that a later
    release adds leaves the names of old runs alone.

    >>> run_name(RunSpec.of({"method": "lora"}))
    'docstrings-lora-seed0-e9881fb148d2'
    """
    default, values = _defaults(), spec.values()
    own = {name: value for name, value in values.items() if value != default[name]}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    task = re.sub(r"[^\w.+-]", "_", Path(spec.task.name).name)  # a task may be a path
    return f"{task}-{spec.method.name}-seed{spec.training.seed}-{digest[:12]}"


@cache
def _defaults() -> dict[str, Any]:
    """The values of a run of which nothing is said."""
    return RunSpec().values()


def execute(
    jobs: Sequence[Job],
    *,
    cluster: Cluster | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = log.info,
) -> list[Record]:
    """Bring every job to its end: what is finished is read, what was interrupted goes on, the rest is run.

    A run that fails is recorded (``record.json``, ``error.txt``) and the others go on; the next call tries it again.

    Args:
        jobs: jobs with one folder are one run.
        cluster: where to run them at once; None: here, one after the other.
        quiet: no progress within a run that happens here.
        say: takes a line of progress.

    Returns:
        The record of every job, in their order.

    Raises:
        ConfigError: a folder holds a run with other settings; nothing was run.
    """
    unique = {job.folder: job for job in jobs}
    for job in jobs:
        same_run(job.folder, job.spec)
        if unique[job.folder].spec != job.spec:
            raise ConfigError(f"{job.folder} is asked to hold two different runs; give each its own folder")
    records = {folder: Record.read(folder / RECORD) for folder in unique if finished(folder)}
    waiting = [job for folder, job in unique.items() if folder not in records]
    if records:
        say(f"{len(records)} of {len(unique)} runs are there already")
    began = time.monotonic()
    done = _here(waiting, quiet) if cluster is None else _there(waiting, cluster)
    for number, (index, record) in enumerate(done, start=1):
        job = waiting[index]
        records[job.folder] = record
        left = (time.monotonic() - began) / number * (len(waiting) - number)
        about = f"  about {_duration(left)} left" if number < len(waiting) else ""
        say(f"[{len(records)}/{len(unique)}] {job.title}: {outcome(record)}{about}")
    return [records[job.folder] for job in jobs]


def outcome(record: Record) -> str:
    """What came of a run, in a few words."""
    if record.status != "ok":
        return f"failed: {record.error}"
    return f"{record.metric} {record.score:.4f}" if record.score is not None else f"no {record.metric}"


def same_run(folder: Path, spec: RunSpec) -> None:
    """Raise ConfigError if `folder` holds a run with other settings."""
    if (folder / CONFIG).is_file() and RunSpec.load(folder).to_dict() != spec.to_dict():
        raise ConfigError(f"{folder} holds a run with other settings; choose another --out, or remove it")


def check_apart(specs: Iterable[RunSpec]) -> None:
    """Check that settings are not chosen on the rows that are reported, by the rows' texts.

    A run that chooses is judged on training rows, so the two meet where training and validation rows do. Some common
    rows are in many public data sets and are told; data that cannot be read are left to the runs, which say why.

    Raises:
        ConfigError: half of the reported rows or more are training rows: one file was given twice, or split in vain.
    """
    different = {replace(spec.task, holdout=None, max_train_samples=None): spec.model.name for spec in specs}
    for described, model in different.items():
        try:
            task = read_task(described, model)
        except WeightLoRAError:
            continue
        seen, rows = task.seen_rows, len(task.validation)
        if 2 * seen >= rows:
            raise ConfigError(
                f"{described.data_name}: {seen} of {rows} reported rows are training rows, on which settings would be"
                " chosen; give validation rows that are not in the training data"
            )
        if seen:
            what = f"{seen} of {rows} reported rows are training rows too, and settings may be chosen on them"
            tell_once(logging.WARNING, f"{described.data_name}: {what}")


def attempt(spec: RunSpec, folder: Path, *, quiet: bool = False) -> Record:
    """Run, resume or read one run, its failure recorded. Two processes that try the same run do it once."""
    if finished(folder):
        return Record.read(folder / RECORD)
    with alone(folder, wait=True):
        if finished(folder):
            return Record.read(folder / RECORD)
        try:
            started = (folder / CONFIG).is_file()
            return resume(folder, quiet=quiet) if started else train(spec, folder, quiet=quiet)
        except Exception as error:  # whatever stops one run before it has a record of its own must not stop the others
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            return write_failure(spec, folder, f"{type(error).__name__}: {line}", traceback.format_exc())


def write_failure(spec: RunSpec, folder: Path, error: str, story: str) -> Record:
    """Write a run that could not even start as one that failed, so that it is counted and tried again."""
    if (folder / RECORD).is_file():
        record = replace(Record.read(folder / RECORD), status="failed", error=error)
    else:
        record = refused(spec, error)
    spec.save(folder)
    write_text(folder / ERROR, story)
    record.write(folder / RECORD)
    return record


def _here(jobs: Sequence[Job], quiet: bool) -> Iterator[tuple[int, Record]]:
    for index, job in enumerate(jobs):
        yield index, attempt(job.spec, job.folder, quiet=quiet)


def _there(jobs: Sequence[Job], cluster: Cluster) -> Iterator[tuple[int, Record]]:
    asked = [(json.dumps(job.spec.to_dict()), str(job.folder.absolute())) for job in jobs]
    # Closed on an exception here, too: a Ray that was started for this must not stay.
    with contextlib.closing(spread(asked, cluster, run_there)) as answers:
        for index, text, error in answers:
            job = jobs[index]
            if text is not None:
                yield index, Record.from_json(text)
            else:
                yield index, write_failure(job.spec, job.folder, error, f"{error}\n")


def run_there(description: str, folder: str, directory: str) -> str:
    """Do in a worker what :func:`attempt` does; relative paths are those of the `directory` it was asked from."""
    os.chdir(directory)
    return attempt(RunSpec.from_dict(json.loads(description)), Path(folder), quiet=True).to_json()


def _duration(seconds: float) -> str:
    """Seconds for people.

    >>> _duration(42), _duration(200), _duration(9000)
    ('42 s', '3 min', '2 h 30 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
