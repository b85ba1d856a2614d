"""The commands over many runs: `sweep` a grid, `reproduce` an experiment of the paper."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightlora.cli import arguments, commands, grids
from weightlora.errors import ConfigError

TABLES = ("table1", "table2", "table3", "table4", "table5", "table6")
TEXT_WIDTH = 120
FIGURES = {"figure2": "probe", "figure3": "memory"}
"""The command that makes a figure from its recipe and from the recipe's section ``reproduce: <command>:``."""


def sweep(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.report import sweep_table
    from weightlora.runs import sweep as sweeping

    grid, folder = grids.make_grid(parser, [], parsed.recipe, parsed.given), Path(parsed.out)
    if parsed.dry_run:
        return dry_run(grid, folder, parsed.json)
    data = sweeping.sweep(grid, folder, cluster=grids.cluster(parsed), quiet=_unwatched(), say=commands._say)
    return _show(sweep_table(data), data, folder / "sweep.md", parsed.json)


def reproduce(parsed: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from weightlora.files import write_text
    from weightlora.report import paper_table
    from weightlora.runs import paper
    from weightlora.runs import sweep as sweeping

    name = parsed.experiment
    small = parsed.scale == "small"
    if name in FIGURES:
        return _figure(name, small, parsed)
    if name not in TABLES:
        raise ConfigError(f"{name!r} is no experiment of this release; there are {', '.join((*TABLES, *FIGURES))}")
    recipe, section = arguments.read_recipe(str(paper.recipe(name))), arguments.read_section(str(paper.recipe(name)))
    papers = grids.make_grid(parser, [name], recipe, [])
    given = [*(arguments.flag_words(section["small"]) if small else []), *parsed.given]
    ours = grids.make_grid(parser, [name], recipe, arguments.without(given, "--task", "--tasks", "--methods"))
    ours = _only(ours, vars(parsed))
    if small:
        ours = _at_hand(_with_shares(ours, section["adapters"]), vars(parsed))
    folder = Path(parsed.out or f"runs/{name}{'-small' if small else ''}")
    if parsed.dry_run:
        return dry_run(ours, folder, parsed.json)
    data = sweeping.sweep(ours, folder, cluster=grids.cluster(parsed), quiet=_unwatched(), say=commands._say)
    data = paper.compared(data, name, ours, papers, section["departures"])
    write_text(folder / f"{name}.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
    return _show(paper_table(data), data, folder / f"{name}.md", parsed.json)


def figure_words(name: str, small: bool, given: Sequence[str], out: str | None) -> list[str]:
    """A figure as words of the command that makes it."""
    from weightlora.runs.paper import recipe

    path, command = str(recipe(name)), FIGURES[name]
    section = arguments.read_section(path)
    shared = arguments.read_recipe(path)
    if command == "memory":  # counted, not trained: one seed draws the random order
        shared = arguments.without(shared, "--seeds")
    words = [command, *shared, *arguments.flag_words(section[command])]
    words += arguments.flag_words(section["small"]) if small else []
    return [*words, *arguments.without(given, "--scale", "--out"), "--out", out or f"runs/{name}"]


def _figure(name: str, small: bool, parsed: argparse.Namespace) -> int:
    from weightlora.cli.main import COMMANDS, main

    if FIGURES[name] not in COMMANDS:
        raise ConfigError(f"{name} is made by `weightlora {FIGURES[name]}`, which this release does not have")
    words = figure_words(name, small, [word for word in parsed.given if word != "--dry-run"], parsed.out)
    if parsed.dry_run:
        return _dry_figure(words, parsed.json)
    return main(words)


def _dry_figure(words: Sequence[str], target: str | None) -> int:
    """Check all of a figure's settings that needs neither weights nor data, and print the command that would run."""
    from weightlora.cli.main import build_parser
    from weightlora.runs.dry import check

    parser = build_parser()[1][words[0]][0]
    parsed, rest = parser.parse_known_args(words[1:])
    config = arguments.run_config(parsed, rest, parser, "weightlora")
    check(config)
    commands._write_json(target, json.dumps({"dry_run": True, "command": list(words), "config": config.to_dict()}))
    if target != "-":
        print(f"would run: {shlex.join(['weightlora', *words])}")
    return 0


def dry_run(grid: Any, folder: Path, target: str | None) -> int:
    """Check all that needs neither weights nor data, and print what would run."""
    from weightlora.runs.dry import check, describe

    for cell in grid.cells:
        check(cell.config)
    trials = [job for cell in grid.cells for job in grid.trials(cell, folder)]
    finals = [job for cell in grid.cells for job in grid.finals(cell, grid.settings[0], folder)]
    unique = {kind: len({job.folder for job in jobs}) for kind, jobs in (("trials", trials), ("runs", finals))}
    cells = [
        {"row": cell.row, "config": cell.config.to_dict(), "describes": describe(cell.config, grid.settings[0])}
        for cell in grid.cells
    ]
    commands._write_json(target, json.dumps({"dry_run": True, **unique, "cells": cells}, indent=1))
    if target != "-":
        for cell in cells:
            print(f"{cell['row']}: {cell['describes']}")
        choice = f"{unique['trials']} runs to choose among {len(grid.settings)} settings each, then " * grid.chooses
        print(f"would run {choice}{unique['runs']} runs over seeds {', '.join(map(str, grid.seeds))} in {folder}")
    return 0


def _only(grid: Any, flags: dict[str, Any]) -> Any:
    """The cells that --task and --methods ask for.

    Raises:
        ConfigError: one asks for what the table does not have; the message lists what it has.
    """
    cells = list(grid.cells)
    tasks = [task for name in ("task", "tasks") for task, _ in grids.entries(flags.get(name, ""), name, "task")]
    methods = [name.lower() for name, _ in grids.entries(flags.get("methods", ""), "methods", "method")]

    def is_row(cell: Any, asked: str) -> bool:
        row, method = cell.row.lower(), cell.config.method
        return asked in (row, method, f"{method}:{cell.config.preset}") or row.startswith(f"{asked} ")

    for asked, found, kind in (
        *((task, any(cell.config.task == task for cell in cells), "task") for task in tasks),
        *((asked, any(is_row(cell, asked) for cell in cells), "method") for asked in methods),
    ):
        if not found:
            rows = dict.fromkeys(cell.config.task if kind == "task" else cell.row for cell in cells)
            raise ConfigError(f"this table has no {kind} {asked!r}; it has {', '.join(rows)}")
    kept = (
        cell
        for cell in cells
        if (not tasks or cell.config.task in tasks) and (not methods or any(is_row(cell, name) for name in methods))
    )
    return replace(grid, cells=tuple(kept))


def _with_shares(grid: Any, adapters: int) -> Any:
    """On a smaller model K stays the same share of all adapters."""
    cells = []
    for cell in grid.cells:
        settings = dict(cell.config.settings)
        if isinstance(settings.get("k"), int):
            settings["k"] = settings["k"] / adapters
        cells.append(replace(cell, config=replace(cell.config, settings=settings)))
    return replace(grid, cells=tuple(cells))


def _at_hand(grid: Any, flags: dict[str, Any]) -> Any:
    """Without the tasks that the folder of --data-dir lacks, said loudly; those asked for by name stay, and fail."""
    if flags.get("data_dir") is None or "task" in flags or "tasks" in flags:
        return grid
    folder = Path(flags["data_dir"])
    missing = [t for t in dict.fromkeys(cell.config.task for cell in grid.cells) if not (folder / t).is_dir()]
    kept = tuple(cell for cell in grid.cells if cell.config.task not in missing)
    if not missing or not kept:
        return grid
    commands._say(f"SKIPPED {', '.join(missing)}: {folder} has no folder of that name; add it, or leave --data-dir out")
    return replace(grid, cells=kept)


def _show(table: Any, data: dict[str, Any], markdown: Path, target: str | None) -> int:
    from weightlora.files import write_text

    write_text(markdown, table.to_markdown())
    commands._write_json(target, json.dumps(data, indent=1, allow_nan=False))
    if target != "-":
        print(table.to_text(TEXT_WIDTH))
        print(f"table: {markdown}")
    runs: Sequence[dict[str, Any]] = [run for cell in data["cells"] for run in (*cell["trials"], *cell["runs"])]
    return 0 if all(run["status"] == "ok" for run in runs) and all(cell["runs"] for cell in data["cells"]) else 1


def _unwatched() -> bool:
    """In a log file a line per run will do; on a terminal there is a bar for the run that is on."""
    return not sys.stderr.isatty()
