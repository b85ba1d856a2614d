"""From the flags and recipes of `sweep` and `reproduce` to a grid: tasks by rows by ranks, each parsed like `train`."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weightlora.cli import arguments
from weightlora.errors import ConfigError

Overrides = dict[str, Any]


def add_grid_flags(parser: argparse.ArgumentParser) -> None:
    """What is repeated, what is tuned."""
    group = parser.add_argument_group("grid (comma-separated lists)")
    flag = functools.partial(group.add_argument, default=argparse.SUPPRESS)
    flag("--tasks", metavar="T,T,...", help="tasks (default: the one of --task)")
    flag("--methods", metavar="M,M,...", help="each NAME or NAME:PRESET; or all (default: weightlora)")
    flag("--ranks", metavar="R,R,...", help="ranks, each with rows of its own (default: the one of --r)")
    flag("--learning-rates", metavar="X,X,...", help="learning rates to choose from, for each task and method")
    flag("--lr-warmups", metavar="N,N,...", help="warm-ups of the learning rate to choose from, steps or shares")
    flag("--seeds", metavar="S,S,...", help="of the reported runs (default: 0,1,2)")
    flag("--selection-seeds", metavar="S,S,...", help="of the runs that choose (default: the first of --seeds)")


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """Where runs run."""
    flag = functools.partial(parser.add_argument, default=argparse.SUPPRESS)
    flag(
        "--ray", metavar="ADDRESS", help="run on a Ray cluster: auto, local, or host:port (pip install weightlora[ray])"
    )
    flag("--ray-cpus", type=float, metavar="N", help="CPUs that one run takes there (default: 1)")
    flag(
        "--ray-gpus",
        type=float,
        metavar="N",
        help="GPUs that one run takes there, also 0.5 (default: 1 if there are any)",
    )


def cluster(parsed: argparse.Namespace) -> Any:
    """The cluster that the flags name, or None."""
    from weightlora.runs.cluster import Cluster

    given = vars(parsed)
    if "ray" not in given:
        extra = sorted({"ray_cpus", "ray_gpus"} & set(given))
        if extra:
            raise ConfigError(f"--{extra[0].replace('_', '-')} needs --ray ADDRESS")
        return None
    values = {name[4:]: given[name] for name in ("ray_cpus", "ray_gpus") if name in given}
    return Cluster(address=given["ray"], **values)


def make_grid(
    parser: argparse.ArgumentParser, words: Sequence[str], recipe: Sequence[str], given: Sequence[str]
) -> Any:
    """The grid of a recipe's words under the command line's.

    Settings of one task or one row stand between both: they count more than what the recipe says for all, and less than
    the command line, which has the last word.

    Args:
        parser: of the command.
        words: positional arguments that the parser wants.
        recipe, given: flags of the recipe and of the command line.
    """
    from weightlora.methods import METHODS
    from weightlora.runs.sweep import Grid

    parsed, _ = parser.parse_known_args([*words, *recipe, *given])
    flags = vars(parsed)
    tasks = entries(flags.get("tasks", flags.get("task", "docstrings")), "tasks", "task")
    if flags.get("methods") == "all":
        rows = [(name, {"method": name}) for name, kind in METHODS.items() if kind.trains != "none"]
    else:
        rows = entries(flags.get("methods", "weightlora"), "methods", "method")
    ranks: list[int | None] = [*_wholes(flags, "ranks", "")] or [None]
    return Grid(
        cells=tuple(
            _cell(parser, words, (recipe, given), row, task, rank) for rank in ranks for row in rows for task in tasks
        ),
        learning_rates=_numbers(flags, "learning_rates"),
        lr_warmups=_numbers(flags, "lr_warmups"),
        seeds=_wholes(flags, "seeds", "0,1,2"),
        metric=flags.get("metric"),
        selection_seeds=_wholes(flags, "selection_seeds", ""),
    )


def _cell(
    parser: argparse.ArgumentParser,
    words: Sequence[str],
    around: tuple[Sequence[str], Sequence[str]],
    row: tuple[str, Overrides],
    task: tuple[str, Overrides],
    rank: int | None,
) -> Any:
    """One cell, parsed as `train` would parse it."""
    from dataclasses import fields, replace

    from weightlora.methods import METHODS
    from weightlora.runs.compare import for_method, parse_method
    from weightlora.runs.config import RunConfig
    from weightlora.runs.sweep import Cell

    label, own = row
    extra = {**task[1], **{key: value for key, value in own.items() if key not in ("method", "name")}}
    name, _ = parse_method(str(own.get("method", label)))
    # Settings of a method that have no flag.
    flags = {flag[2:].replace("-", "_") for flag, _ in arguments.METHOD_FLAGS} | {f.name for f in fields(RunConfig)}
    unflagged = METHODS[name].settings() - flags
    settings = {key: extra.pop(key) for key in list(extra) if key in unflagged}
    recipe, given = around
    line = [*words, *recipe, *arguments.flag_words(extra), *given, "--task", task[0]]
    parsed, rest = parser.parse_known_args(line if rank is None else [*line, "--r", str(rank)])
    config = arguments.run_config(parsed, rest, parser, "weightlora+")
    name, preset = parse_method(str(own.get("method", label)), config.preset)
    config = for_method(config, name, preset)
    if settings:
        config = replace(config, settings={**config.settings, **settings})
    return Cell(row=label if rank is None else f"{label} r={rank}", config=config)


def entries(text: str, what: str, key: str) -> list[tuple[str, Overrides]]:
    """The entries of a list: names, or JSON (as recipes have it) with settings of their own.

    >>> entries("cola, sst2", "tasks", "task")
    [('cola', {}), ('sst2', {})]
    >>> entries('{"mnli": {"num_train_epochs": 7}}', "tasks", "task")
    [('mnli', {'num_train_epochs': 7})]
    >>> entries('[{"name": "K = 1", "method": "weightlora:paper", "k": 1}]', "methods", "method")
    [('K = 1', {'name': 'K = 1', 'method': 'weightlora:paper', 'k': 1})]
    """
    if not text.strip().startswith(("[", "{")):
        return [(name.strip(), {}) for name in text.split(",") if name.strip()]
    try:
        return list(_structured(json.loads(text), key))
    except (ValueError, TypeError):
        raise ConfigError(
            f"{what} must list names, map each to settings of its own, or list mappings with {key!r}; see docs/sweep.md"
        ) from None


def _structured(data: Any, key: str) -> Iterator[tuple[str, Overrides]]:
    if isinstance(data, dict):
        for name, settings in data.items():
            yield str(name), dict(settings or {})
        return
    for item in data:
        if isinstance(item, Mapping) and key in item:
            yield str(item.get("name", item[key])), dict(item)
        elif isinstance(item, str):
            yield item, {}
        else:
            raise TypeError


def _wholes(flags: Mapping[str, Any], name: str, default: str) -> tuple[int, ...]:
    return tuple(arguments.whole(text, name) for text in flags.get(name, default).split(",") if text.strip())


def _numbers(flags: Mapping[str, Any], name: str) -> tuple[float, ...]:
    return tuple(float(arguments.number(text, name)) for text in flags.get(name, "").split(",") if text.strip())
