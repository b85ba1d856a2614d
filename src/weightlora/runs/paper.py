"""The paper's experiments: where their recipes lie, what was printed, and in what a run of ours differs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weightlora.runs.config import RunConfig
from weightlora.runs.sweep import Grid

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "paper"
TABLES = ("table1", "table2", "table3", "table4", "table5", "table6")
# What does not make it another experiment: where data lie, what is tuned or repeated, how a step is cut up.
NOT_COMPARED = (
    *("data_dir", "train_file", "validation_file", "seed", "split_seed", "holdout", "settings", "training"),
    *("micro_batch", "final_micro_batch", "engine"),
)
TUNED = ("learning_rate", "warmup_steps")
UNSEEN = ("report_to", "logging_steps", "save_steps", "save_strategy", "save_total_limit", "dataloader_num_workers")


def recipe(experiment: str) -> Path:
    """The recipe file of an experiment."""
    return FOLDER / f"{experiment}.yaml"


def printed(table: str) -> dict[str, Any]:
    """What the paper prints: ``title``, ``percent``, ``metrics`` by task, and ``rows`` with ``scores`` by task.

    >>> next(row for row in printed("table1")["rows"] if row["row"] == "LoRA")["scores"]["cola"]
    [0.6913]
    """
    found: dict[str, Any] = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))[table]
    return found


def differences(ours: RunConfig, papers: RunConfig) -> list[str]:
    """In what a run departs from the recipe of the paper, one line each; [] if in nothing that matters.

    >>> differences(RunConfig(max_length=48, training={"max_steps": 9}), RunConfig(training={"num_train_epochs": 3.0}))
    ['max_length 48, not 128', 'max_steps 9, not unset', 'num_train_epochs unset, not 3']
    """
    one, other = asdict(ours), asdict(papers)
    lines = [f"{name} {_value(one[name])}, not {_value(other[name])}"
             for name in one if name not in NOT_COMPARED and one[name] != other[name]]  # fmt: skip
    for group, passed in (("settings", ()), ("training", (*TUNED, *UNSEEN))):
        for name in sorted({*one[group], *other[group]} - set(passed)):
            mine, theirs = one[group].get(name), other[group].get(name)
            if mine != theirs:
                lines.append(f"{name} {_value(mine)}, not {_value(theirs)}")
    return lines


def grid_differences(ours: Grid, papers: Grid) -> list[str]:
    """In what the tuning and the seeds depart from the paper's."""
    pairs: tuple[tuple[str, Sequence[float], Sequence[float]], ...] = (
        ("learning rates", ours.learning_rates, papers.learning_rates),
        ("warm-ups", ours.lr_warmups, papers.lr_warmups),
    )
    lines = [f"{what} {_list(mine)}, not {_list(theirs)}" for what, mine, theirs in pairs if set(mine) != set(theirs)]
    if len(ours.seeds) != len(papers.seeds):
        lines.append(f"{len(ours.seeds)} seed{'s' * (len(ours.seeds) > 1)}, not {len(papers.seeds)}")
    return lines


def compared(data: dict[str, Any], table: str, ours: Grid, papers: Grid, standing: Sequence[str]) -> dict[str, Any]:
    """A sweep's summary with the paper's numbers and our departures beside each cell.

    Args:
        data: what :func:`weightlora.runs.sweep.sweep` returned for `ours`.
        table: a name of `TABLES`.
        ours: what was run.
        papers: the recipe.
        standing: departures that hold however the recipe is run.

    Returns:
        ``data`` with the table's ``experiment``, ``title``, ``percent``, ``metrics``, ``averages``, and in each cell
        ``paper`` (``scores`` and ``params``, None where the paper has none) and ``differs``.
    """
    there = printed(table)
    rows = {row["row"]: row for row in there["rows"]}
    theirs = {(cell.row, cell.config.task): cell.config for cell in papers.cells}
    common = [*grid_differences(ours, papers), *standing]
    cells = []
    for entry, cell in zip(data["cells"], ours.cells, strict=True):
        key = cell.row, cell.config.task
        row = rows.get(cell.row, {"scores": {}, "params": None})
        own = differences(cell.config, theirs[key]) if key in theirs else ["the paper has no such row"]
        scores = row["scores"].get(cell.config.task)
        cells.append({**entry, "paper": {"scores": scores, "params": row["params"]}, "differs": [*own, *common]})
    return {
        **data,
        "cells": cells,
        "experiment": table,
        "title": there["title"],
        "percent": there["percent"],
        "metrics": there["metrics"],
        "averages": {name: row["average"] for name, row in rows.items()},
        "note": there.get("note", ""),
    }


def _value(value: Any) -> str:
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _list(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in sorted(values)) or "untuned"
