"""What a study runs: cells of tasks and rows, settings to choose from, and seeds; made from mappings of settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from weightlora.errors import ConfigError
from weightlora.methods import METHODS
from weightlora.runs.build import training_arguments
from weightlora.runs.record import check_metric
from weightlora.runs.spec import DEFAULT_METHOD, RunSpec
from weightlora.settings import check, numbers, wholes
from weightlora.study.spec import GridSpec
from weightlora.tasks import LANGUAGE, read_task

Overlay = Mapping[str, Any]
HOLDOUT = 0.1
TUNED = {"learning_rate": "lr", "warmup_steps": "warm-up"}
"""Fields of ``TrainingArguments`` that a grid can choose, and what a line calls them."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One entry of the summary: a task and a row of the table. Learning rate, its warm-up and seeds come from the grid.

    ``spec.task.holdout`` is the share of training rows on which settings are chosen (None: a tenth).
    """

    row: str
    spec: RunSpec

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from the other cells of its grid."""
        return self.row, self.spec.task.name


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Everything that a study runs.

    Args:
        cells: what is reported, each by itself.
        learning_rates: to choose from, or empty: each cell's own.
        tune: multiples of each cell's own learning rate to choose from (full fine-tuning starts lower), or empty.
        lr_warmups: warm-up of the learning rate to choose from, in steps or a share of the run; or empty.
        seeds: of the reported runs.
        selection_seeds: of the trials that choose; empty: the first of `seeds`.
        metric: what chooses and is reported: "eval_loss", or None for each task's own.

    Raises:
        ConfigError: nothing to run, the same cell or value twice, or a value that is not allowed.
    """

    cells: tuple[Cell, ...]
    learning_rates: tuple[float, ...] = ()
    tune: tuple[float, ...] = ()
    lr_warmups: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    selection_seeds: tuple[int, ...] = ()
    metric: str | None = None

    def __post_init__(self) -> None:
        check_metric(self.metric)
        names = [cell.key for cell in self.cells]
        listed: tuple[tuple[str, Sequence[object]], ...] = (
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
        if self.tune and self.learning_rates:
            raise ConfigError("tune and learning_rates both choose the learning rate; give one of them")
        for rate in self.learning_rates:
            if not 0 < rate < math.inf:
                raise ConfigError(f"learning_rates has {rate:g}; use rates above 0, such as 5e-5,5e-4")
        rates = bool(self.tune) and max(self.tune) < 0.01  # what somebody gave who took it for a list of rates
        if rates or any(not 0 < factor < math.inf for factor in self.tune):
            factors = ",".join(f"{factor:g}" for factor in self.tune)
            raise ConfigError(
                f"tune={factors} must be multiples of each method's own learning rate, such as 0.3,1,3; rates"
                " themselves go with learning_rates, such as 3e-4,1e-3"
            )
        for warmup in self.lr_warmups:
            if not 0 <= warmup < math.inf:
                raise ConfigError(f"lr_warmups has {warmup:g}; use steps, or shares of the run, of 0 or more")
        if self.chooses:
            for cell in self.cells:
                on_training_rows(cell.spec)

    def settings(self, cell: Cell) -> list[dict[str, float]]:
        """Every combination that a cell chooses from, as fields of ``TrainingArguments``; low values first."""
        rates = self.learning_rates
        if self.tune:
            usual = training_arguments(cell.spec, Path("unused")).learning_rate
            rates = tuple(float(f"{usual * factor:.6g}") for factor in self.tune)
        axes = {"learning_rate": rates, "warmup_steps": self.lr_warmups}
        used = {name: sorted(values) for name, values in axes.items() if values}
        return [dict(zip(used, values, strict=True)) for values in itertools.product(*used.values())]

    @property
    def combinations(self) -> int:
        """How many settings each cell chooses from."""
        return max(1, len(self.learning_rates or self.tune)) * max(1, len(self.lr_warmups))

    @property
    def chooses(self) -> bool:
        """Whether there is anything to choose."""
        return self.combinations > 1 or bool(self.tune)

    @property
    def choosing_seeds(self) -> tuple[int, ...]:
        """The seeds of the trials."""
        return self.selection_seeds or self.seeds[:1]


def on_training_rows(spec: RunSpec) -> RunSpec:
    """Describe the run that chooses settings for `spec`: judged on a held-out share of the training rows.

    Raises:
        ConfigError: the reported rows would be among them.
    """
    if spec.task.lacks_validation:
        raise ConfigError(
            "without --validation-file, settings would be chosen on the rows that are reported; give a validation file"
        )
    return spec.but(holdout=spec.task.holdout or HOLDOUT)


def make_grid(recipe: Overlay, given: Overlay) -> Grid:
    """Make the grid of a recipe's settings under the command line's.

    Settings of one task or one row stand between both: they count more than what the recipe says for all, and less than
    the command line, which has the last word.

    Raises:
        ConfigError: a list that is none, or a setting that is not allowed.
    """
    together = {**recipe, **given}
    own = {each.name for each in fields(GridSpec)}
    lists = GridSpec(**{name: together[name] for name in own & set(together)})
    check(lists)
    around = [{name: value for name, value in each.items() if name not in own} for each in (recipe, given)]
    tasks = entries(lists.tasks or around[1].get("task", around[0].get("task", "docstrings")), "tasks", "task")
    if lists.methods == "all":
        shared = RunSpec.of(*around, tasks[0][1], {"task": tasks[0][0], "method": "lora"}, lenient=True)
        rows: list[tuple[str, Overlay]] = [(name, {}) for name in all_methods(shared if len(tasks) == 1 else None)]
    else:
        rows = entries(lists.methods or DEFAULT_METHOD, "methods", "method")
    ranks: Sequence[int | None] = wholes(lists.ranks, "ranks") or [None]
    return Grid(
        cells=tuple(_cell(around, row, task, rank) for rank in ranks for row in rows for task in tasks),
        learning_rates=numbers(lists.learning_rates, "learning_rates"),
        tune=numbers(lists.tune, "tune"),
        lr_warmups=numbers(lists.lr_warmups, "lr_warmups"),
        seeds=wholes(lists.seeds, "seeds"),
        metric=lists.metric,
        selection_seeds=wholes(lists.selection_seeds, "selection_seeds"),
    )


def _cell(around: Sequence[Overlay], row: tuple[str, Overlay], task: tuple[str, Overlay], rank: int | None) -> Cell:
    recipe, given = around
    label, own = row
    named = {"method": own.get("method", label), "task": task[0]}
    between = {**task[1], **{name: value for name, value in own.items() if name not in ("method", "name")}}
    last = {} if rank is None else {"r": rank}
    spec = RunSpec.of(recipe, between, given, named, last, lenient=True)
    return Cell(row=label if rank is None else f"{label} r={rank}", spec=spec)


def all_methods(spec: RunSpec | None) -> list[str]:
    """Name every method; asking the model as it is needs a task that is answered in words, and so one task alone."""
    in_words = spec is not None and read_task(spec.task, spec.model.name).head in LANGUAGE
    return [name for name, kind in METHODS.items() if in_words or kind.learns]


def entries(listed: object, what: str, key: str) -> list[tuple[str, Overlay]]:
    """Read the entries of a list: names, or mappings (as recipes have them) with settings of their own.

    >>> entries("cola, sst2", "tasks", "task")
    [('cola', {}), ('sst2', {})]
    >>> entries({"mnli": {"num_train_epochs": 7}}, "tasks", "task")
    [('mnli', {'num_train_epochs': 7})]
    >>> entries([{"name": "K = 1", "method": "weightlora:paper", "k": 1}], "methods", "method")
    [('K = 1', {'name': 'K = 1', 'method': 'weightlora:paper', 'k': 1})]
    """
    if isinstance(listed, str):
        return [(name.strip(), {}) for name in listed.split(",") if name.strip()]
    try:
        return list(_structured(listed, key))
    except (ValueError, TypeError):
        raise ConfigError(
            f"{what} must list names, map each to settings of its own, or list mappings with {key!r}; see docs/sweep.md"
        ) from None


def _structured(data: Any, key: str) -> Iterator[tuple[str, Overlay]]:
    if isinstance(data, Mapping):
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
