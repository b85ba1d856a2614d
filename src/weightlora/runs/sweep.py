"""A protocol as a grid: settings are chosen on held-out training rows, then run on all of them over seeds."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightlora.errors import ConfigError
from weightlora.files import write_text
from weightlora.methods import METHODS
from weightlora.runs.cluster import Cluster
from weightlora.runs.config import RunConfig
from weightlora.runs.jobs import Job, check_apart, execute, on_training_rows, run_name
from weightlora.runs.record import Record, check_metric
from weightlora.runs.run import finished

log = logging.getLogger("weightlora")

SCHEMA_VERSION = 1
SUMMARY = "sweep.json"
TRIALS, RUNS = "tune", "runs"
HOLDOUT = 0.1


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One entry of the summary: a task and a row of the table. Learning rate, its warm-up and seeds come from the grid.

    ``config.holdout`` is the share of training rows on which settings are chosen (None: a tenth).
    """

    row: str
    config: RunConfig


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Everything that a sweep runs.

    Args:
        cells: what is reported, each by itself.
        learning_rates: to choose from, or empty: each cell's own.
        lr_warmups: warm-up of the learning rate to choose from, in steps or a share of the run; or empty.
        seeds: of the reported runs.
        selection_seeds: of the trials that choose; empty: the first of `seeds`.
        metric: what chooses and is reported: "eval_loss", or None for each task's own.

    Raises:
        ConfigError: nothing to run, the same cell or value twice, or a value that is not allowed.
    """

    cells: tuple[Cell, ...]
    learning_rates: tuple[float, ...] = ()
    lr_warmups: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    selection_seeds: tuple[int, ...] = ()
    metric: str | None = None

    def __post_init__(self) -> None:
        check_metric(self.metric)
        names = [(cell.row, cell.config.task) for cell in self.cells]
        listed: tuple[tuple[str, Sequence[Any]], ...] = (
            ("cells", names),
            ("learning_rates", self.learning_rates),
            ("lr_warmups", self.lr_warmups),
            ("seeds", self.seeds),
            ("selection_seeds", self.selection_seeds),
        )
        for what, values in listed:
            twice = sorted({str(value) for value in values if values.count(value) > 1})
            if twice:
                raise ConfigError(f"{what} lists {twice[0]} twice; name each once")
        if not self.cells or not self.seeds:
            raise ConfigError("the sweep has nothing to run; name at least one task, one method and one seed")
        for rate in self.learning_rates:
            if not 0 < rate < math.inf:
                raise ConfigError(f"learning_rates has {rate:g}; use rates above 0, such as 5e-5,5e-4")
        for warmup in self.lr_warmups:
            if not 0 <= warmup < math.inf:
                raise ConfigError(f"lr_warmups has {warmup:g}; use steps, or shares of the run, of 0 or more")
        if self.chooses:
            for cell in self.cells:
                on_training_rows(cell.config, HOLDOUT)

    @property
    def settings(self) -> list[dict[str, float]]:
        """Every combination to choose from, as fields of ``TrainingArguments``; low values first."""
        axes = {"learning_rate": self.learning_rates, "warmup_steps": self.lr_warmups}
        used = {name: sorted(values) for name, values in axes.items() if values}
        return [dict(zip(used, values, strict=True)) for values in itertools.product(*used.values())]

    @property
    def chooses(self) -> bool:
        """Whether there is anything to choose."""
        return len(self.settings) > 1

    def trials(self, cell: Cell, folder: Path) -> list[Job]:
        """The runs that choose a cell's setting: settings by selection seeds; none where there is nothing to choose."""
        if not self.chooses or METHODS[cell.config.method].trains == "none":
            return []
        base = on_training_rows(cell.config, cell.config.holdout or HOLDOUT)
        seeds = self.selection_seeds or self.seeds[:1]
        return [
            _job(replace(_with(base, settings), seed=seed), folder / TRIALS, f"tuning {cell.row}", settings)
            for settings in self.settings
            for seed in seeds
        ]

    def finals(self, cell: Cell, chosen: dict[str, float], folder: Path) -> list[Job]:
        """The runs that are reported: all training rows, judged on the validation rows."""
        base = replace(_with(cell.config, chosen), holdout=None)
        return [_job(replace(base, seed=seed), folder / RUNS, cell.row, chosen) for seed in self.seeds]


def _with(config: RunConfig, settings: dict[str, float]) -> RunConfig:
    return replace(config, training={**config.training, **settings})


def _job(config: RunConfig, folder: Path, what: str, settings: dict[str, float]) -> Job:
    title = ", ".join([config.task, what, *setting_words(settings), f"seed {config.seed}"])
    return Job(config=config, folder=folder / run_name(config), title=title)


def setting_words(settings: dict[str, float]) -> list[str]:
    """A setting for people.

    >>> setting_words({"learning_rate": 5e-4, "warmup_steps": 100.0})
    ['lr 0.0005', 'warm-up 100']
    """
    names = {"learning_rate": "lr", "warmup_steps": "warm-up"}
    return [f"{names[name]} {value:g}" for name, value in settings.items()]


def sweep(
    grid: Grid,
    folder: Path,
    *,
    cluster: Cluster | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = log.info,
) -> dict[str, Any]:
    """Choose every cell's setting on held-out training rows, run it on all training rows over seeds, sum up.

    A run's directory is ``folder/tune/NAME`` or ``folder/runs/NAME``, where NAME follows from its configuration
    (:func:`weightlora.runs.jobs.run_name`): what is finished is not run again, whichever grid asked for it, and what
    was interrupted goes on. The best setting is the one with the best mean score over the selection seeds, the
    lower learning rate and shorter warm-up on a tie; a setting of which a run failed is out.

    Args:
        grid: what to run.
        folder: where; it also gets ``sweep.json``.
        cluster, quiet, say: as :func:`weightlora.runs.jobs.execute`.

    Returns:
        What ``sweep.json`` holds: the grid and, per cell, the chosen setting, its trials and its runs.

    Raises:
        ConfigError: a run directory holds something else, or half of the reported rows are training rows and there is
            something to choose. A run that fails is recorded and does not stop the others.
    """
    trials = [grid.trials(cell, folder) for cell in grid.cells]
    if grid.chooses:
        say(f"choosing among {len(grid.settings)} settings on held-out training rows")
    if any(not finished(job.folder) for jobs in trials for job in jobs):
        check_apart(cell.config for cell in grid.cells)
    tried = iter(execute([job for jobs in trials for job in jobs], cluster=cluster, quiet=quiet, say=say))
    tries = [[(job, next(tried).judged_by(grid.metric)) for job in jobs] for jobs in trials]
    chosen = [_choose(grid, pairs) for pairs in tries]
    finals = [
        [] if setting is None else grid.finals(cell, setting, folder)
        for cell, setting in zip(grid.cells, chosen, strict=True)
    ]
    if grid.chooses:
        say(f"running the chosen settings with {len(grid.seeds)} seeds on all training rows")
    ran = iter(execute([job for jobs in finals for job in jobs], cluster=cluster, quiet=quiet, say=say))
    cells = [
        {
            "row": cell.row,
            "task": cell.config.task,
            "chosen": setting,
            "trials": [_entry(job, record, folder) for job, record in pairs],
            "runs": [_entry(job, next(ran).judged_by(grid.metric), folder) for job in jobs],
        }
        for cell, setting, pairs, jobs in zip(grid.cells, chosen, tries, finals, strict=True)
    ]
    data = {
        "schema_version": SCHEMA_VERSION,
        "learning_rates": sorted(grid.learning_rates),
        "lr_warmups": sorted(grid.lr_warmups),
        "seeds": list(grid.seeds),
        "selection_seeds": list(grid.selection_seeds or grid.seeds[:1]) if grid.chooses else [],
        "cells": cells,
    }
    write_text(folder / SUMMARY, json.dumps(data, indent=1, allow_nan=False) + "\n")
    return data


def _choose(grid: Grid, pairs: Sequence[tuple[Job, Record]]) -> dict[str, float] | None:
    """The setting with the best mean score; None if every one failed."""
    if not pairs:
        return {} if grid.chooses else (grid.settings or [{}])[0]
    means = []
    for number, settings in enumerate(grid.settings):
        records = [record for job, record in pairs if settings.items() <= job.config.training.items()]
        scores = [record.merit for record in records if record.status == "ok" and record.merit is not None]
        if len(scores) == len(records) and all(map(math.isfinite, scores)):
            means.append((math.fsum(scores) / len(scores), -number))
    return grid.settings[-max(means)[1]] if means else None


def _entry(job: Job, record: Record, folder: Path) -> dict[str, Any]:
    """What the summary keeps of one run."""
    metrics = {name: value if math.isfinite(value) else None for name, value in record.metrics.items()}
    return {
        "folder": str(job.folder.relative_to(folder)),
        "method": record.method,
        "preset": record.preset,
        "settings": {name: job.config.training[name] for name in ("learning_rate", "warmup_steps")
                     if name in job.config.training},
        "seed": record.seed,
        "status": record.status,
        "error": record.error,
        "metric": record.metric,
        "score": metrics.get(record.metric),
        "metrics": metrics,
        "scored_on": record.scored_on,
        "adapters": len(record.kept),
        "params": record.budget.get("effective"),
    }  # fmt: skip
