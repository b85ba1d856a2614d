"""The commands over many runs: `compare` methods, `sweep` a grid, `reproduce` an experiment of the paper."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from weightlora.cli.command import Command, Given, option_dry_run, option_out, say
from weightlora.cli.flags import words_of
from weightlora.errors import ConfigError
from weightlora.files import write_text
from weightlora.runs.figure_specs import CurveSpec, ProbeSpec
from weightlora.runs.spec import RunSpec
from weightlora.study.cluster import Cluster
from weightlora.study.spec import GridSpec

if TYPE_CHECKING:
    from weightlora.study.grid import Grid

TEXT_WIDTH = 120


def compare(given: Given) -> int:
    from weightlora.study.grid import make_grid

    if "tasks" in given.settings:
        raise ConfigError("compare is about one task; give --task, or use `weightlora sweep` for several")
    # Rates are tuned with one seed that no reported run depends on.
    grid = make_grid({"methods": "all", "selection_seeds": "0", **given.recipe}, given.flags)
    return _run(given, grid, Path(given.options.out))


def sweep(given: Given) -> int:
    from weightlora.study.grid import make_grid

    return _run(given, make_grid(given.recipe, given.flags), Path(given.options.out))


def _run(given: Given, grid: Grid, folder: Path) -> int:
    from weightlora.report import study_table
    from weightlora.study.sweep import sweep as run

    if given.options.dry_run:
        return _dry_run(given, grid, folder)
    study = run(grid, folder, cluster=_cluster(given), quiet=_unwatched(), say=say)
    table = study_table(study.summary, study.records)
    write_text(folder / "table.md", table.to_markdown())
    write_text(folder / "table.json", table.to_json())
    page = f"weightlora report {shlex.quote(str(folder))} --out {shlex.quote(str(folder / 'report.html'))}"
    given.show_json(
        study.summary,
        table.to_text(TEXT_WIDTH),
        f"table: {folder / 'table.md'}",
        f"next: {page}   (what each run kept, with pictures)",
    )
    return 0 if study.all_went_well else 1


def reproduce(given: Given) -> int:
    from weightlora.report import paper_table
    from weightlora.study import paper
    from weightlora.study.sweep import sweep as run

    options = given.options
    name, small = options.experiment, options.scale == "small"
    paper.check_experiment(name)
    if name in paper.FIGURES:
        return _figure(given, name, small)
    made = paper.reproduction(name, given.flags, small=small)
    if made.skipped:
        where = given.flags["data_dir"]
        say(f"SKIPPED {', '.join(made.skipped)}: {where} has no folder of that name; add it, or leave --data-dir out")
    folder = Path(options.out or f"runs/{name}{'-small' if small else ''}")
    if options.dry_run:
        return _dry_run(given, made.ours, folder)
    study = run(made.ours, folder, cluster=_cluster(given), quiet=_unwatched(), say=say)
    data = paper.compared(study.summary, made)
    write_text(folder / f"{name}.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
    table = paper_table(data)
    write_text(folder / f"{name}.md", table.to_markdown())
    given.show_json(data, table.to_text(TEXT_WIDTH), f"table: {folder / f'{name}.md'}")
    return 0 if study.all_went_well else 1


def _figure(given: Given, name: str, small: bool) -> int:
    """Make a figure by the command that its recipe is for."""
    from weightlora.cli.commands import COMMANDS
    from weightlora.runs.dry import check
    from weightlora.study import paper

    command, settings = paper.figure(name, given.flags, small=small)
    if given.options.dry_run:
        own = ("mode", "seeds", "gradient_rows", "ranks", "points", "limit")
        spec = RunSpec.of({key: value for key, value in settings.items() if key not in own})
        check(spec)
        plain = {"dry_run": True, "command": command, "settings": settings, "config": spec.to_dict()}
        given.show_json(plain, f"would run: {shlex.join(['weightlora', command, *words_of(settings)])}")
        return 0
    options = argparse.Namespace(out=given.options.out or f"runs/{name}", overwrite=False, json=given.options.json)
    return COMMANDS[command].run(Given(options=options, flags=settings))


def _dry_run(given: Given, grid: Grid, folder: Path) -> int:
    """Check all that needs neither weights nor data, and print what would run."""
    from weightlora.runs.dry import check, describe
    from weightlora.study.sweep import jobs_of

    for cell in grid.cells:
        check(cell.spec)
    trials, runs = ({job.folder for job in jobs} for jobs in jobs_of(grid, folder))
    tuned = grid.settings(grid.cells[0])[0]
    cells = [
        {"row": cell.row, "config": cell.spec.to_dict(), "describes": describe(cell.spec, tuned)} for cell in grid.cells
    ]
    choice = f"{len(trials)} runs to choose among {grid.combinations} settings each, then " * grid.chooses
    seeds = ", ".join(map(str, grid.seeds))
    given.show_json(
        {"dry_run": True, "trials": len(trials), "runs": len(runs), "cells": cells},
        *(f"{cell['row']}: {cell['describes']}" for cell in cells),
        f"would run {choice}{len(runs)} runs over seeds {seeds} in {folder}",
    )
    return 0


def _cluster(given: Given) -> Cluster | None:
    """The cluster that the flags name, or None."""
    options = given.options
    both = {"cpus": options.ray_cpus, "gpus": options.ray_gpus}
    wanted = {name: value for name, value in both.items() if value is not None}
    if options.ray is None and wanted:
        raise ConfigError(f"--ray-{next(iter(wanted))} needs --ray ADDRESS")
    return None if options.ray is None else Cluster(address=options.ray, **wanted)


def _unwatched() -> bool:
    """In a log file a line per run will do; on a terminal there is a bar for the run that is on."""
    return not sys.stderr.isatty()


def _add_where(parser: argparse.ArgumentParser) -> None:
    """Where runs run, and whether they run at all."""
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run on a Ray cluster: auto, local, or host:port (needs the extra: pip install 'weightlora[ray]')",
    )
    parser.add_argument("--ray-cpus", type=float, metavar="N", help="with --ray: CPUs for each run (default: 1)")
    parser.add_argument(
        "--ray-gpus",
        type=float,
        metavar="N",
        help="with --ray: GPUs for each run, also 0.5 (default: 1 if the cluster has any)",
    )
    option_dry_run(parser)


def _add_study(parser: argparse.ArgumentParser, out: str) -> None:
    option_out(parser, out)
    _add_where(parser)


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", metavar="EXPERIMENT", help="table1 to table6, figure2, figure3")
    option_out(parser, None, shown="runs/EXPERIMENT")
    parser.add_argument(
        "--scale", default="full", choices=("full", "small"), help="small: a small model, few steps and rows"
    )
    _add_where(parser)


COMMANDS = {
    "compare": Command(
        help="run methods against each other, over seeds, in one table",
        usage="[RECIPE.yaml] [FLAGS]",
        example="weightlora compare --methods weightlora,random,lora --seeds 0,1,2 --task sst2 --data-dir DATA --k 9",
        add=partial(_add_study, out="runs/compare"),
        run=compare,
        specs=(GridSpec,),
        title="grid (comma-separated lists)",
        takes_run=True,
    ),
    "sweep": Command(
        help="tune and run a grid of tasks and methods over seeds, here or on a Ray cluster",
        usage="[RECIPE.yaml] [FLAGS]",
        example="weightlora sweep --tasks cola,sst2 --methods lora,weightlora --learning-rates 3e-4,1e-3 --out glue",
        add=partial(_add_study, out="runs/sweep"),
        run=sweep,
        specs=(GridSpec,),
        title="grid (comma-separated lists)",
        takes_run=True,
    ),
    "reproduce": Command(
        help="run an experiment of the paper, and set its numbers beside ours",
        usage="EXPERIMENT [--scale small] [FLAGS]",
        example="weightlora reproduce table1 --task cola --methods lora,weightlora --scale small --data-dir DATA",
        add=_add_reproduce,
        run=reproduce,
        specs=(GridSpec, ProbeSpec, CurveSpec),
        title="grid (comma-separated lists)",
        takes_run=True,
    ),
}
