"""The paper's experiments: their recipes as grids and figures, what was printed, in what a run of ours differs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightlora.errors import ConfigError
from weightlora.runs.recipe import read_recipe
from weightlora.runs.spec import RunSpec
from weightlora.study.grid import TUNED, Cell, Grid, Overlay, entries, make_grid

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "paper"
TABLES = ("table1", "table2", "table3", "table4", "table5", "table6")
FIGURES = {"figure2": "probe", "figure3": "memory"}
"""The command that makes a figure from its recipe and from the recipe's section ``reproduce: <command>:``."""
# What does not make it another experiment: where data lie, what is tuned or repeated, how a step is cut up.
NOT_COMPARED = (
    *("data_dir", "train_file", "validation_file", "seed", "split_seed", "holdout", "settings", "training"),
    *("micro_batch", "final_micro_batch", "engine"),
)
UNSEEN = ("report_to", "logging_steps", "save_steps", "save_strategy", "save_total_limit", "dataloader_num_workers")


def recipe_file(experiment: str) -> Path:
    """The recipe file of an experiment."""
    return FOLDER / f"{experiment}.yaml"


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """A table of the paper as it is to be run: ``ours``, beside the recipe's grid ``papers`` and its ``departures``.

    ``skipped``: tasks whose folders are not at hand.
    """

    table: str
    ours: Grid
    papers: Grid
    departures: Sequence[str]
    skipped: tuple[str, ...] = ()


def check_experiment(name: str) -> None:
    """Raise ConfigError unless an experiment of this name is here."""
    if name not in (*TABLES, *FIGURES):
        raise ConfigError(f"{name!r} is not an experiment; use one of {', '.join((*TABLES, *FIGURES))}")


def reproduction(table: str, given: Overlay, *, small: bool) -> Reproduction:
    """Read a table's recipe, and put the user's settings on top.

    Args:
        table: a name of `TABLES`.
        given: settings of the command line; ``task``, ``tasks`` and ``methods`` choose cells of the table.
        small: on a small model, with few steps and rows: the recipe's own scale for a try.

    Raises:
        ConfigError: the table has no such task or method, or a setting is not allowed.
    """
    recipe, section = read_recipe(recipe_file(table))
    papers = make_grid(recipe, {})
    own = {name: value for name, value in given.items() if name not in ("task", "tasks", "methods")}
    ours = make_grid(recipe, {**(section["small"] if small else {}), **own})
    ours = _only(ours, given)
    skipped: tuple[str, ...] = ()
    if small:
        ours, skipped = _at_hand(_with_shares(ours, section["adapters"]), given)
    return Reproduction(table=table, ours=ours, papers=papers, departures=section["departures"], skipped=skipped)


def figure(name: str, given: Overlay, *, small: bool) -> tuple[str, Overlay]:
    """Read a figure's recipe: the command that makes it, and its settings with the user's on top."""
    recipe, section = read_recipe(recipe_file(name))
    command = FIGURES[name]
    if command == "memory":  # counted, not trained: one seed draws the random order
        recipe = {key: value for key, value in recipe.items() if key != "seeds"}
    return command, {**recipe, **section[command], **(section["small"] if small else {}), **given}


def _only(grid: Grid, given: Overlay) -> Grid:
    """The cells that `task`, `tasks` and `methods` ask for."""
    cells = grid.cells
    tasks = [task for name in ("task", "tasks") for task, _ in entries(given.get(name, ""), name, "task")]
    methods = [name.lower() for name, _ in entries(given.get("methods", ""), "methods", "method")]

    def is_row(cell: Cell, asked: str) -> bool:
        row, method = cell.row.lower(), cell.spec.method
        return asked in (row, method.name, f"{method.name}:{method.preset}") or row.startswith(f"{asked} ")

    for asked, found, kind in (
        *((task, any(cell.spec.task.name == task for cell in cells), "task") for task in tasks),
        *((asked, any(is_row(cell, asked) for cell in cells), "method") for asked in methods),
    ):
        if not found:
            rows = dict.fromkeys(cell.spec.task.name if kind == "task" else cell.row for cell in cells)
            raise ConfigError(f"this table has no {kind} {asked!r}; it has {', '.join(rows)}")
    kept = (
        cell
        for cell in cells
        if (not tasks or cell.spec.task.name in tasks) and (not methods or any(is_row(cell, name) for name in methods))
    )
    return replace(grid, cells=tuple(kept))


def _with_shares(grid: Grid, adapters: int) -> Grid:
    """On a smaller model K stays the same share of all adapters."""
    cells = []
    for cell in grid.cells:
        settings = dict(cell.spec.method.settings)
        k = settings.get("k")
        if isinstance(k, int):
            settings["k"] = k / adapters
        cells.append(replace(cell, spec=cell.spec.but(settings=settings)))
    return replace(grid, cells=tuple(cells))


def _at_hand(grid: Grid, given: Overlay) -> tuple[Grid, tuple[str, ...]]:
    """Without the tasks that the folder of data lacks, and their names; those asked for by name stay, and fail."""
    if given.get("data_dir") is None or "task" in given or "tasks" in given:
        return grid, ()
    folder = Path(given["data_dir"])
    tasks = dict.fromkeys(cell.spec.task.name for cell in grid.cells)
    missing = tuple(task for task in tasks if not (folder / task).is_dir())
    kept = tuple(cell for cell in grid.cells if cell.spec.task.name not in missing)
    return (replace(grid, cells=kept), missing) if kept and missing else (grid, ())


def printed(table: str) -> dict[str, Any]:
    """What the paper prints: ``title``, ``percent``, ``metrics`` by task, and ``rows`` with ``scores`` by task.

    >>> next(row for row in printed("table1")["rows"] if row["row"] == "LoRA")["scores"]["cola"]
    [0.6913]
    """
    found: dict[str, object] = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))[table]
    return found


def differences(ours: RunSpec, papers: RunSpec) -> list[str]:
    """Say in what a run departs from the recipe of the paper, one line each; [] if in nothing that matters.

    >>> ours = RunSpec.of({"max_length": 48, "max_steps": 9})
    >>> differences(ours, RunSpec.of({"num_train_epochs": 3.0}))
    ['max_length 48, not 128', 'max_steps 9, not unset', 'num_train_epochs unset, not 3']
    """
    one, other = ours.values(), papers.values()
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


def compared(data: dict[str, Any], made: Reproduction) -> dict[str, Any]:
    """Put the paper's numbers and our departures beside each cell of a study's summary.

    Returns:
        ``data`` with the table's ``experiment``, ``title``, ``percent``, ``metrics``, ``averages``, and in each cell
        ``paper`` (``scores`` and ``params``, None where the paper has none) and ``differs``.
    """
    table, ours, papers, standing = made.table, made.ours, made.papers, made.departures
    there = printed(table)
    rows = {row["row"]: row for row in there["rows"]}
    theirs = {(cell.row, cell.spec.task.name): cell.spec for cell in papers.cells}
    common = [*grid_differences(ours, papers), *standing]
    cells = []
    for entry, cell in zip(data["cells"], ours.cells, strict=True):
        key = cell.row, cell.spec.task.name
        row = rows.get(cell.row, {"scores": {}, "params": None})
        own = differences(cell.spec, theirs[key]) if key in theirs else ["the paper has no such row"]
        scores = row["scores"].get(cell.spec.task.name)
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


def _value(value: object) -> str:
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _list(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in sorted(values)) or "untuned"
