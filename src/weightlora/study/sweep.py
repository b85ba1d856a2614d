"""The one protocol: settings are chosen on held-out training rows, then run on all of them over seeds."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightlora.errors import ConfigError, WeightLoRAError
from weightlora.files import write_text
from weightlora.methods import METHODS
from weightlora.runs.build import build, check_method, check_shared
from weightlora.runs.record import Record
from weightlora.runs.run import finished, refused
from weightlora.runs.spec import RunSpec
from weightlora.study.cluster import Cluster
from weightlora.study.grid import TUNED, Cell, Grid, on_training_rows
from weightlora.study.jobs import Job, check_apart, execute, run_name
from weightlora.tasks import read_task

log = logging.getLogger("weightlora")

SCHEMA_VERSION = 1
SUMMARY = "sweep.json"
TRIALS, RUNS = "tune", "runs"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What came of a grid: ``summary``, as ``sweep.json`` holds it, and the ``records`` of the reported runs.

    A cell that could not start has a record for every seed too, but no folder: there is nothing to resume.
    """

    summary: dict[str, Any]
    records: tuple[Record, ...]

    @property
    def all_went_well(self) -> bool:
        """Whether every run, trials included, ended well."""
        cells = self.summary["cells"]
        runs = [run for cell in cells for run in (*cell["trials"], *cell["runs"])]
        return all(run["status"] == "ok" for run in runs) and all(cell["runs"] for cell in cells)


def sweep(
    grid: Grid,
    folder: Path,
    *,
    cluster: Cluster | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = log.info,
) -> Study:
    """Choose every cell's setting on held-out training rows, run it on all training rows over seeds, sum up.

    A run's directory is ``folder/tune/NAME`` or ``folder/runs/NAME``, where NAME follows from its description
    (:func:`weightlora.study.jobs.run_name`): what is finished is not run again, whichever grid asked for it, and what
    was interrupted goes on. The best setting is the one with the best mean score over the selection seeds, the
    lower learning rate and shorter warm-up on a tie; a setting of which a run failed is out.

    Args:
        grid: what to run.
        folder: where; it also gets ``sweep.json``.
        cluster, quiet, say: as :func:`weightlora.study.jobs.execute`.

    Raises:
        WeightLoRAError: of one task, what all cells share cannot work, or no cell can start; before the first run.
        ConfigError: a run directory holds something else, or half of the reported rows are training rows and there is
            something to choose. A run that fails is recorded and does not stop the others.
    """
    failures = _cannot_start(grid, folder)
    for row, why in failures.items():
        say(f"{row} cannot start: {why}")
    cells = [cell for cell in grid.cells if cell.row not in failures]
    trials = {cell.key: _trials(grid, cell, folder) for cell in cells}
    if grid.chooses:
        say(f"choosing among {grid.combinations} settings on held-out training rows")
    if any(not finished(job.folder) for jobs in trials.values() for job in jobs):
        check_apart(cell.spec for cell in cells)
    tried = iter(execute([job for jobs in trials.values() for job in jobs], cluster=cluster, quiet=quiet, say=say))
    tries = {key: [(job, next(tried).judged_by(grid.metric)) for job in jobs] for key, jobs in trials.items()}
    chosen = {cell.key: _choose(grid, cell, tries[cell.key]) for cell in cells}
    finals = {
        cell.key: [] if (best := chosen[cell.key]) is None else _finals(grid, cell, best, folder) for cell in cells
    }
    if grid.chooses:
        say(f"running the chosen settings with {len(grid.seeds)} seeds on all training rows")
    ran = iter(execute([job for jobs in finals.values() for job in jobs], cluster=cluster, quiet=quiet, say=say))
    records: list[Record] = []
    entries = []
    for cell in grid.cells:
        runs = [(job, next(ran).judged_by(grid.metric)) for job in finals.get(cell.key, ())]
        why = failures.get(cell.row, f"no setting worked; see {folder / TRIALS}")
        records += [record for _, record in runs] or _refused(grid, cell, why)
        entries.append(
            {
                "row": cell.row,
                "task": cell.spec.task.name,
                "chosen": chosen.get(cell.key),
                "trials": [_entry(job, record, folder) for job, record in tries.get(cell.key, ())],
                "runs": [_entry(job, record, folder) for job, record in runs],
            }
        )
    summary = {
        "schema_version": SCHEMA_VERSION,
        "learning_rates": sorted(grid.learning_rates),
        "tune": sorted(grid.tune),
        "lr_warmups": sorted(grid.lr_warmups),
        "seeds": list(grid.seeds),
        "selection_seeds": list(grid.choosing_seeds) if grid.chooses else [],
        "cells": entries,
    }
    write_text(folder / SUMMARY, json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return Study(summary=summary, records=tuple(records))


def jobs_of(grid: Grid, folder: Path) -> tuple[list[Job], list[Job]]:
    """The runs that choose, and those that report (with the first setting, since none is chosen yet)."""
    trials = [job for cell in grid.cells for job in _trials(grid, cell, folder)]
    finals = [job for cell in grid.cells for job in _finals(grid, cell, grid.settings(cell)[0], folder)]
    return trials, finals


def _trials(grid: Grid, cell: Cell, folder: Path) -> list[Job]:
    """The runs that choose a cell's setting: settings by selection seeds; none where there is nothing to choose."""
    if not grid.chooses or not METHODS[cell.spec.method.name].learns:
        return []
    base = on_training_rows(cell.spec)
    return [
        _job(base.with_training(**setting).but(seed=seed), folder / TRIALS, f"tuning {cell.row}", setting)
        for setting in grid.settings(cell)
        for seed in grid.choosing_seeds
    ]


def _finals(grid: Grid, cell: Cell, chosen: dict[str, float], folder: Path) -> list[Job]:
    """The runs that are reported: where settings were chosen, with all training rows and on the validation rows."""
    base = cell.spec.with_training(**chosen)
    base = base.but(holdout=None) if grid.chooses else base
    return [_job(base.but(seed=seed), folder / RUNS, cell.row, chosen) for seed in grid.seeds]


def _job(spec: RunSpec, folder: Path, what: str, setting: dict[str, float]) -> Job:
    title = ", ".join([spec.task.name, what, *setting_words(setting), f"seed {spec.training.seed}"])
    return Job(spec=spec, folder=folder / run_name(spec), title=title)


def setting_words(setting: dict[str, float]) -> list[str]:
    """Say a setting for people.

    >>> setting_words({"learning_rate": 5e-4, "warmup_steps": 100.0})
    ['lr 0.0005', 'warm-up 100']
    """
    return [f"{TUNED[name]} {value:g}" for name, value in setting.items()]


def _choose(grid: Grid, cell: Cell, pairs: Sequence[tuple[Job, Record]]) -> dict[str, float] | None:
    """The setting with the best mean score; None if every one failed."""
    settings = grid.settings(cell)
    if not pairs:
        return {} if grid.chooses else settings[0]
    means = []
    for number, setting in enumerate(settings):
        records = [record for job, record in pairs if setting.items() <= job.spec.training.arguments.items()]
        scores = [record.merit for record in records if record.status == "ok" and record.merit is not None]
        if len(scores) == len(records) and all(map(math.isfinite, scores)):
            means.append((math.fsum(scores) / len(scores), -number))
    return settings[-max(means)[1]] if means else None


def _cannot_start(grid: Grid, folder: Path) -> dict[str, str]:
    """Why some rows cannot start: a mistake must show now, not after hours of others. Of one task alone."""
    if len({cell.spec.task.name for cell in grid.cells}) > 1:
        return {}
    first = {
        cell.row: _trials(grid, cell, folder) or _finals(grid, cell, grid.settings(cell)[0], folder)
        for cell in grid.cells
    }
    waiting = [cell for cell in grid.cells if not all(finished(job.folder) for job in first[cell.row])]
    if waiting:
        check_shared(waiting[0].spec)
    errors: dict[str, WeightLoRAError] = {}
    for number, cell in enumerate(waiting):
        try:
            if number:
                check_method(cell.spec)
            else:
                build(cell.spec)  # once with the rows tokenized: they are the same for every row
        except WeightLoRAError as error:
            errors[cell.row] = error
    if errors and len(errors) == len(grid.cells):
        row, why = next(iter(errors.items()))
        raise ConfigError(f"no run can start; {row}: {why}") from why
    return {row: str(why) for row, why in errors.items()}


def _refused(grid: Grid, cell: Cell, why: str) -> list[Record]:
    """Records of a cell without runs: it cannot start, or no setting worked."""
    try:
        metric = read_task(cell.spec.task, cell.spec.model.name).metric
    except WeightLoRAError:
        metric = ""  # there are no rows to judge by
    return [refused(cell.spec.but(seed=seed), why, metric).judged_by(grid.metric) for seed in grid.seeds]


def _entry(job: Job, record: Record, folder: Path) -> dict[str, Any]:
    """What the summary keeps of one run."""
    metrics = {name: value if math.isfinite(value) else None for name, value in record.metrics.items()}
    arguments = job.spec.training.arguments
    return {
        "folder": str(job.folder.relative_to(folder)),
        "method": record.method,
        "preset": record.preset,
        "settings": {name: arguments[name] for name in TUNED if name in arguments},
        "seed": record.seed,
        "status": record.status,
        "error": record.error,
        "metric": record.metric,
        "score": metrics.get(record.metric),
        "metrics": metrics,
        "scored_on": record.scored_on,
        "adapters": len(record.kept),
        "params": record.budget.get("effective"),
    }
