"""What a command line or a recipe may say about a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from weightlora.settings import setting

Listed: TypeAlias = str | int | float | list[object] | dict[str, object] | None


@dataclass(frozen=True, kw_only=True)
class GridSpec:
    """Say what is repeated and what is tuned; the lists of a command line or a recipe.

    Raises:
        ConfigError: a value that is not allowed.
    """

    tasks: Listed = setting(None, "tasks to compare on (default: the one of --task)", metavar="T,T,...")
    methods: Listed = setting(None, "methods to compare, each NAME or NAME:PRESET; or all", metavar="M,M,...")
    ranks: Listed = setting(
        None, "ranks to compare; each is a row of the table (default: the one of --r)", metavar="R,R,..."
    )
    learning_rates: Listed = setting(None, "learning rates to choose from, for each task and method", metavar="X,X,...")
    tune: Listed = setting(
        None,
        "choose each method's learning rate from these multiples of its default (such as 0.3,1,3)",
        metavar="X,X,...",
    )
    lr_warmups: Listed = setting(
        None, "learning-rate warm-ups to choose from, in steps or as shares of the run", metavar="N,N,..."
    )
    seeds: Listed = setting("0,1,2", "seeds of the runs that are reported (default: 0,1,2)", metavar="S,S,...")
    selection_seeds: Listed = setting(
        None, "seeds of the runs that choose settings (default: the first of --seeds)", metavar="S,S,..."
    )
    metric: str | None = setting(
        None,
        "compare and choose by the loss on the validation rows (lower is better); default: the task's metric",
        choices=("eval_loss",),
    )
